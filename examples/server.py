"""A pruned model as an OpenAI-like server, without vLLM; requests that wait are answered together.

    python examples/server.py
    python examples/server.py --model llava-hf/llava-1.5-7b-hf --device cuda --pruner divprune \
        --num-keep 64 --port 8000

Needs `pip install -e '.[serve]'` in a clone. `POST /v1/chat/completions` takes what OpenAI's
clients send: text, images as data URLs, `stream`, `max_tokens`; and `num_keep`, the visual tokens
of each image of this request. Answers are greedy. `GET /health` says what is served.
A client: docs/serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import json
import queue
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import torch
from PIL.Image import Image
from transformers import StoppingCriteria, StoppingCriteriaList

import ocvtp
from ocvtp.hosts.loading import check_model, load_model
from ocvtp.images import IMAGE_ERRORS, decode_image, limit_pixels
from ocvtp.pruners.specs import build_specs, has_own_budget
from ocvtp.reporting.command_line import in_flags

NEEDS = (
    "examples/server.py: error: needs {}, which is missing; in a clone, pip install -e '.[serve]'."
)
try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ModuleNotFoundError as error:
    raise SystemExit(NEEDS.format(error.name)) from None

T = TypeVar("T")


class Text(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Url(BaseModel):
    """Where an image is: in the request itself."""

    url: str


class Picture(BaseModel):
    """A part of a message."""

    type: Literal["image_url"]
    image_url: Url


Part = Annotated[Text | Picture, Field(discriminator="type")]


class Message(BaseModel):
    """A turn of the conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=128)]


class Chat(BaseModel):
    """A request; what would be ignored or read as something else is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    messages: list[Message] = Field(min_length=1, max_length=512)  # templates take long for many
    model: str | None = None
    num_keep: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    stream_options: dict[str, bool] | None = None  # the usage always comes with the last piece
    ignore_eos: bool = False
    temperature: float = Field(0, ge=0, le=0)
    n: int = Field(1, ge=1, le=1)
    seed: int | None = None
    user: str | None = None


class Refused(Exception):
    """What a client did wrong, and the status that says so."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Piece:
    """What is new of an answer; the last one says why it ended."""

    text: str
    ended: Literal["stop", "length"] | None = None


@dataclass(eq=False)
class Question:
    """A request that waits or runs. `put` takes pieces and errors, from any thread."""

    text: str
    images: list[Image]
    num_keep: int | None
    max_tokens: int
    ignore_eos: bool
    put: Callable[[Piece | Exception], None]
    tokens: list[int] = field(default_factory=list)
    shown: str = ""
    is_over: bool = False
    gave_up: bool = False
    prompt_tokens: int = 0
    visual_tokens: list[int] = field(default_factory=list)
    visual_tokens_kept: list[int] = field(default_factory=list)

    def end(self, last: Piece | Exception) -> None:
        """Nothing comes after it."""
        self.is_over = True
        self.put(last)


class Pieces(StoppingCriteria):
    """Hands each row of a batch its tokens as they come, and says which rows are done."""

    def __init__(self, rows: Sequence[Question], processor: Any, ends: set[int]) -> None:
        self.rows, self.processor, self.ends = rows, processor, ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens = input_ids[:, -1].tolist()
        done = [self._is_done(row, token) for row, token in zip(self.rows, tokens, strict=True)]
        return torch.tensor(done, device=input_ids.device)

    def _is_done(self, row: Question, token: int) -> bool:
        if row.is_over or row.gave_up:
            return True
        row.tokens.append(token)
        at_end = token in self.ends and not row.ignore_eos
        is_long = len(row.tokens) == row.max_tokens
        text = self.processor.decode(row.tokens, skip_special_tokens=True)
        if text.endswith("\ufffd") and not (at_end or is_long):
            return False  # the rest of a character is in the next token
        new, row.shown = text[len(row.shown) :], text
        if at_end or is_long:
            row.end(Piece(new, "stop" if at_end else "length"))
        elif new:
            row.put(Piece(new))
        return row.is_over


USUAL = 36
"""Visual tokens of an image where neither flags nor a request say how many."""
PATIENCE = 0.05
"""Seconds that a batch may wait for as many questions as the last one had."""
SLICE, SLACK = 2**14, 16
"""Characters of a text whose tokens are counted at a time, and the most tokens that a cut adds."""
MOST_TOLD, LONGEST_TOLD = 8, 300
"""Faults of a body that are told, and the characters of each: they repeat what the client wrote."""
LINGER = 10.0
"""Seconds that the rest of a body is waited for when its request is refused."""


class Worker:
    """Answers questions, all that wait at once.

    Clients that were answered together ask again one after the other: without patience the first of
    them would run alone, while all others wait for its end.

    Args:
        model, processor: see `ocvtp.hosts.loading.load_model`.
        pruner: of all requests; its `num_keep` is that of requests that name none.
        max_batch: questions at a time. max_waiting: more are refused.
        text_tower: see `ocvtp.attach`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        pruner: Any,
        max_batch: int,
        max_waiting: int,
        text_tower: str | None = None,
    ) -> None:
        self.model, self.processor, self.pruner = model, processor, pruner
        processor.tokenizer.padding_side = "left"  # answers follow their prompts, in batches too
        # of a pruner of several parts, each has its own
        self.num_keep = pruner.num_keep if pruner.parts == (pruner,) else None
        self.max_batch = max_batch
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.context = model.config.get_text_config().max_position_embeddings
        # of the threads of requests: the worker's changes how its own pads
        self.counter = deepcopy(processor.tokenizer)
        self.counter("")
        self.waiting: queue.Queue[Question | None] = queue.Queue(max_waiting)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.answered = self.batches = 0
        self._asked: list[Question] = []
        self._handle = ocvtp.attach(
            model, pruner, processor=processor, text_tower=text_tower, on_prune=self._note
        )

    def stop(self) -> None:
        """Finish what waits, and leave the model as it was."""
        self.waiting.put(None)
        self.thread.join()
        self._handle.remove()

    def ask(self, question: Question) -> None:
        """Let a question wait.

        Raises:
            queue.Full: if as many wait as may.
        """
        self.waiting.put_nowait(question)

    def check_text(self, text: str, max_tokens: int) -> None:
        """Refuse a text that is too long before it is asked, when all would wait for its end.

        No more of it is read than shows that; what its images add is known later.

        Raises:
            Refused: for what the model cannot read, whatever is kept of the images.
        """
        least, room = 0, self.context - max_tokens
        for start in range(0, len(text), SLICE):
            part = text[start : start + SLICE]
            found = self.counter(part, add_special_tokens=False, verbose=False)["input_ids"]
            least += len(found) - (SLACK if start else 0)
            if least > room:
                raise too_long(f"{least} tokens or more", max_tokens, self.context)

    def _run(self) -> None:
        batch: list[Question | None] = []
        while None not in batch:
            batch = self._next_batch(len(batch))
            for group in alike(one for one in batch if one is not None and not one.gave_up):
                self.answered, self.batches = self.answered + len(group), self.batches + 1
                self._answer(group)

    def _next_batch(self, expected: int) -> list[Question | None]:
        """All that wait; as long as they are fewer than expected, others have a moment to come."""
        batch, end = [self.waiting.get()], time.monotonic() + PATIENCE
        while None not in batch and len(batch) < self.max_batch:
            left = end - time.monotonic() if len(batch) < expected else 0
            try:
                batch.append(self.waiting.get(block=left > 0, timeout=max(left, 0)))
            except queue.Empty:
                break
        return batch

    def _answer(self, group: list[Question]) -> None:
        """Answer a group; where that fails, each alone, so that only what is wrong is refused."""
        try:
            self._generate(group)
        except Exception as error:
            untouched = [one for one in group if not (one.tokens or one.gave_up)]
            for one in group:
                if not one.is_over and (one.tokens or len(group) == 1):
                    one.end(error)
            if len(group) > 1:
                for one in untouched:
                    self._answer([one])

    @torch.no_grad()
    def _generate(self, group: list[Question]) -> None:
        first = group[0]
        has_images = bool(first.images)
        inputs = self.processor(
            images=[one.images for one in group] if has_images else None,
            text=[one.text for one in group],
            return_tensors="pt",
            padding=True,
        ).to(self.model.device, self.model.dtype)
        for one, mask in zip(group, inputs["attention_mask"], strict=True):
            one.prompt_tokens = int(mask.sum())
        if not has_images:
            self._check_lengths(group)
        self._asked = group
        asked = [one.num_keep for one in group]  # None where the pruner's own counts
        budgets = {"num_keep": asked} if any(asked) else {}
        longest = max(one.max_tokens for one in group)
        self.model.generate(
            **inputs,
            **budgets,
            do_sample=False,
            max_new_tokens=longest,
            min_new_tokens=longest if first.ignore_eos else None,
            stopping_criteria=StoppingCriteriaList([Pieces(group, self.processor, self.ends)]),
        )

    def _note(self, prompt: Any) -> None:
        """Write down what was pruned of each question, before the language model reads it."""
        counts = prompt.summary()
        before, after = iter(counts["visual_tokens"]), iter(counts["visual_tokens_kept"])
        for one, length in zip(self._asked, counts["prompt_tokens_kept"], strict=True):
            one.prompt_tokens = length
            one.visual_tokens = [next(before) for _ in one.images]
            one.visual_tokens_kept = [next(after) for _ in one.images]
        self._check_lengths(self._asked)

    def _check_lengths(self, group: Sequence[Question]) -> None:
        for one in group:
            if one.prompt_tokens + one.max_tokens > self.context:
                found = f"{one.prompt_tokens} tokens after pruning"
                raise too_long(found, one.max_tokens, self.context)


def too_long(found: str, max_tokens: int, context: int) -> Refused:
    """Of a prompt with so many tokens, in words."""
    return Refused(
        400,
        f"the prompt has {found}, and with max_tokens={max_tokens} more than the {context} that the"
        " model reads; pass a smaller max_tokens, num_keep or prompt.",
    )


def alike(batch: Iterable[Question]) -> Iterator[list[Question]]:
    """The questions of a batch that one `generate` can answer, group by group."""
    groups: dict[Any, list[Question]] = {}
    for one in batch:
        key = (bool(one.images), one.ignore_eos)
        groups.setdefault(key, []).append(one)
    yield from groups.values()


def build_app(worker: Worker, limits: argparse.Namespace) -> FastAPI:
    """The application; `limits` are flags of `parse`."""
    name = limits.model

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.thread.start()
        yield
        await run_in_threadpool(worker.stop)

    app = FastAPI(title="a pruned model", lifespan=lifespan)
    app.add_middleware(WholeBodies)

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(as_error(error.message, error.status), error.status, headers)

    @app.exception_handler(HTTPException)
    async def explain(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {cut(request.url.path)}: {error.detail}; see docs/serving.md."
        return JSONResponse(as_error(message, error.status_code), error.status_code, error.headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        is_alive = worker.thread.is_alive()
        facts = {
            "status": "ok" if is_alive else "the model's thread has ended",
            "model": name,
            "pruner": worker.pruner.name,
            "num_keep": worker.num_keep,
            "waiting": worker.waiting.qsize(),
            "answered": worker.answered,
            "batches": worker.batches,
        }
        return JSONResponse(facts, 200 if is_alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "ocvtp"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        if worker.waiting.full():  # before its body is read
            raise Refused(429, "as many requests wait as may; try again later.")
        body = await read_body(request, limits.max_body_bytes)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()

        def put(piece: Piece | Exception) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        is_stream, question = await run_in_threadpool(read_question, body, worker, limits, put)
        try:
            worker.ask(question)
        except queue.Full:
            raise Refused(429, "as many requests wait as may; try again later.") from None
        # what is wrong has a status, in streams too
        first = checked(await while_there(request, question, pieces.get()))
        reply = Reply(question, pieces, first, name)
        if is_stream:
            return StreamingResponse(reply.events(), media_type="text/event-stream")
        return await while_there(request, question, reply.whole())

    return app


async def while_there(request: Request, question: Question, answer: Coroutine[Any, Any, T]) -> T:
    """What is awaited; a client that goes away before ends its question.

    Raises:
        Refused: if it did, for nobody to read. And what `answer` raises.
    """
    wanted, gone = asyncio.create_task(answer), asyncio.create_task(request.receive())
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if wanted.done():
            return wanted.result()
        raise Refused(400, "the client went away.")
    finally:
        question.gave_up = not wanted.done()
        wanted.cancel()
        gone.cancel()


class WholeBodies:
    """Reads what is left of a request's body, for some time, before the request is answered.

    A client that still sends would see a connection that is reset, and not what it did wrong.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_left = scope["type"] == "http"

        async def read() -> Any:
            nonlocal is_left
            message = await receive()
            is_left = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def read_rest() -> None:
            while is_left:
                await read()

        async def answer(message: Any) -> None:
            if is_left and message["type"] == "http.response.start":
                with suppress(TimeoutError):
                    await asyncio.wait_for(read_rest(), LINGER)
            await send(message)

        await self.app(scope, read, answer)


@dataclass
class Reply:
    """What a client gets, from the first piece on."""

    question: Question
    pieces: asyncio.Queue[Piece | Exception]
    first: Piece
    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        texts, piece = [self.first.text], self.first
        while piece.ended is None:
            piece = checked(await self.pieces.get())
            texts.append(piece.text)
        message = {"role": "assistant", "content": "".join(texts)}
        choice = {"index": 0, "message": message, "finish_reason": piece.ended}
        return {**self._head("chat.completion"), "choices": [choice], **self._counts()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; a client that goes away ends it."""
        try:
            yield self._event({"role": "assistant", "content": ""})
            piece: Piece | Exception = self.first
            while isinstance(piece, Piece):
                if piece.text:
                    yield self._event({"content": piece.text})
                if piece.ended is not None:
                    yield self._event({}, piece.ended, self._counts())
                    yield "data: [DONE]\n\n"
                    return
                piece = await self.pieces.get()
            yield f"data: {json.dumps(as_error(str(piece), 500))}\n\n"
        finally:
            self.question.gave_up = True

    def _event(self, delta: Any, ended: str | None = None, more: Any = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": ended}
        chunk = {**self._head("chat.completion.chunk"), "choices": [choice], **(more or {})}
        return f"data: {json.dumps(chunk)}\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _counts(self) -> dict[str, Any]:
        asked = self.question
        new = len(asked.tokens)
        usage = {
            "prompt_tokens": asked.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": asked.prompt_tokens + new,
        }
        pruned = {"visual_tokens": asked.visual_tokens, "kept": asked.visual_tokens_kept}
        return {"usage": usage, "ocvtp": pruned}


def as_error(message: str, status: int) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def checked(piece: Piece | Exception) -> Piece:
    """A piece; what a client can mend is refused, all else is a fault of the server's.

    Raises:
        Refused: for an error.
    """
    if isinstance(piece, Piece):
        return piece
    if isinstance(piece, Refused):
        raise piece
    status = 400 if isinstance(piece, ValueError) else 500
    raise Refused(status, f"{type(piece).__name__}: {piece}") from piece


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        Refused: if it has more bytes than `most`, or says so.
    """
    problem = Refused(413, f"the request has more than {most} bytes; send smaller images.")
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > most:
        raise problem
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise problem
    except ClientDisconnect:
        raise Refused(400, "the body ended before all of it was sent.") from None
    return bytes(body)


def read_question(
    body: bytes,
    worker: Worker,
    limits: argparse.Namespace,
    put: Callable[[Piece | Exception], None],
) -> tuple[bool, Question]:
    """Whether the answer is to be streamed, and what the model is asked.

    Raises:
        Refused: for what is wrong with it.
    """
    chat = parse_chat(body)
    check_chat(chat, worker, limits)
    return chat.stream, as_question(chat, worker, limits, put)


def parse_chat(body: bytes) -> Chat:
    """A request.

    Raises:
        Refused: for what is wrong with it.
    """
    try:
        return Chat.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        told = [f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}" for one in found]
        more = [f"and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
        raise Refused(400, "; ".join([*map(cut, told[:MOST_TOLD]), *more])) from error


def cut(text: str) -> str:
    """Its beginning alone, where it is long."""
    return text if len(text) <= LONGEST_TOLD else f"{text[:LONGEST_TOLD]}..."


def check_chat(chat: Chat, worker: Worker, limits: argparse.Namespace) -> None:
    """Refuse what this server cannot do.

    Raises:
        Refused: for the first.
    """
    if chat.model not in (None, limits.model):
        raise Refused(404, f"model {cut(repr(chat.model))} is not served; pass {limits.model!r}.")
    if chat.num_keep is not None and worker.num_keep is None:
        raise Refused(
            400,
            f"the pruner {worker.pruner.name} of this server has no num_keep that a request could"
            " change; leave it out.",
        )
    wanted = chat.max_completion_tokens or chat.max_tokens or 1
    if wanted > limits.max_new_tokens:
        raise Refused(400, f"max_tokens={wanted}; pass at most {limits.max_new_tokens}.")


def as_question(
    chat: Chat, worker: Worker, limits: argparse.Namespace, put: Callable[[Piece | Exception], None]
) -> Question:
    """What the model is asked.

    Raises:
        Refused: for images that cannot be read or are too many, and for a conversation that the
            model's template does not take or that is too long.
    """
    turns, images = [], list[Image]()
    for message in chat.messages:
        parts: list[dict[str, str]] = []
        for part in [message.content] if isinstance(message.content, str) else message.content:
            if isinstance(part, Picture):
                if len(images) == limits.max_images:
                    raise Refused(400, f"a request may have up to {limits.max_images} images.")
                images.append(as_image(part.image_url.url, len(images)))
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part if isinstance(part, str) else part.text})
        turns.append({"role": message.role, "content": parts})
    try:
        text = worker.processor.apply_chat_template(turns, add_generation_prompt=True)
    except Exception as error:  # templates raise anything at conversations that they do not take
        raise Refused(400, f"the model's chat template does not take it: {error}") from error
    if text.count(worker.processor.image_token) != len(images):
        raise Refused(400, f"{worker.processor.image_token} stands for an image; leave it out.")
    default = min(256, limits.max_new_tokens)
    max_tokens = chat.max_completion_tokens or chat.max_tokens or default
    worker.check_text(text, max_tokens)
    return Question(str(text), images, chat.num_keep, max_tokens, chat.ignore_eos, put)


def as_image(url: str, number: int) -> Image:
    """An image that a data URL holds; no other place is asked for one.

    Raises:
        Refused: if it holds none.
    """
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise Refused(
            400, f"image {number} is no data URL; pass data:image/png;base64,... or image/jpeg."
        )
    try:
        return decode_image(base64.b64decode(data, validate=True))
    except (*IMAGE_ERRORS, binascii.Error) as error:
        raise Refused(
            400, f"image {number} cannot be read ({error}); pass a JPEG or PNG."
        ) from error


def main(words: Sequence[str] | None = None) -> None:
    """Load the model, and serve it."""
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise SystemExit(NEEDS.format(error.name)) from None

    limit_pixels(arguments.max_pixels)
    try:
        with in_flags(vars(arguments), words):
            worker = build_worker(arguments)
    except ValueError as error:
        raise SystemExit(f"examples/server.py: error: {error}") from None
    app = build_app(worker, arguments)
    uvicorn.run(app, host=arguments.host, port=arguments.port, access_log=False)


def build_worker(arguments: argparse.Namespace) -> Worker:
    """The model under its pruner.

    Raises:
        ValueError: for flags that make no sense; before the model is loaded, where that is known.
    """
    spec, num_keep, text_tower = arguments.pruner, arguments.num_keep, arguments.text_tower
    if num_keep is None and not has_own_budget(spec):
        num_keep = USUAL
    (pruner,) = build_specs([spec], num_keep=num_keep, checkpoint=arguments.checkpoint)
    place = (arguments.model, arguments.dtype, arguments.device)
    check_model(*place, [pruner], text_tower)
    sizes = (arguments.max_batch, arguments.max_waiting)
    return Worker(*load_model(*place), pruner, *sizes, text_tower)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="serve a pruned model")
    parser.add_argument("--model", default="checkpoints/demo-vlm", help="folder or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pruner", default="divprune", help="see `ocvtp list`; none: no pruning")
    parser.add_argument(
        "--num-keep", type=int, help=f"of requests that name none (default: {USUAL})"
    )
    parser.add_argument("--checkpoint", help="exported network, for pruners that take one")
    parser.add_argument(
        "--text-tower", help="folder or hub id of a CLIP, for pruners that compare images with it"
    )
    parser.add_argument("--host", default="127.0.0.1", help="who may ask (default: this machine)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=32, help="requests at a time")
    parser.add_argument("--max-waiting", type=int, default=64, help="more are refused (429)")
    parser.add_argument("--max-body-bytes", type=int, default=20_000_000)
    parser.add_argument("--max-images", type=int, default=8, help="of a request")
    parser.add_argument("--max-pixels", type=int, default=2**24, help="of an image")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

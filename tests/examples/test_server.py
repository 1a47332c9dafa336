"""The example server answers as `ocvtp.attach` and `generate` do, whoever else asks at the time."""

from __future__ import annotations

import asyncio
import base64
import json
import runpy
import sys
import threading
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from ocvtp import build_pruner
from ocvtp.data.questions import ask
from ocvtp.data.scenes import draw_scene
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.images import encoded

pytest.importorskip("fastapi", reason="fastapi is of the extras `serve` and `dev`")
DEMO = "checkpoints/demo-vlm"


@pytest.fixture(scope="module")
def server():
    """The example as a module."""
    spec = spec_from_file_location("example_server", "examples/server.py")
    module = module_from_spec(spec)
    sys.modules["example_server"] = module  # dataclasses and pydantic look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["example_server"]


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO, "float32")


@pytest.fixture
def served(server, demo):
    """The application of a worker, which runs as long as `conversation` does."""
    workers = []

    def make(max_batch: int = 8, max_waiting: int = 64, **limits: int) -> Any:
        pruner = build_pruner("divprune", num_keep=36)
        worker = server.Worker(*demo, pruner, max_batch, max_waiting)
        workers.append(worker)
        flags = server.parse([])
        vars(flags).update(model="demo", **limits)
        return server.build_app(worker, flags), worker

    yield make
    for worker in workers:
        if worker.thread.ident is None:  # was not begun
            worker._handle.remove()


async def call(app: Any, method: str, path: str, *body: bytes, **headers: str) -> Any:
    """One request, its body in parts, as a server of ASGI passes it on: status, headers, body in
    its parts, and the parts of the request that were not read when it was answered."""
    sent = [{"type": "http.request", "body": part, "more_body": True} for part in body or [b""]]
    sent[-1]["more_body"] = False
    status, parts, answered = [], [], asyncio.Event()

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop(0)
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {k.decode(): v.decode() for k, v in message["headers"]}
            status.append((message["status"], names, len(sent)))
        elif message.get("body"):
            parts.append(message["body"].decode())

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": b"", "scheme": "http",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
        "server": ("127.0.0.1", 8000), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    answered.set()
    ((code, names, unread),) = status
    text = "".join(parts)
    return SimpleNamespace(status=code, headers=names, parts=parts, text=text, unread=unread)


def post(app: Any, chat: Any) -> Any:
    body = chat if isinstance(chat, bytes) else json.dumps(chat).encode()
    return call(app, "POST", "/v1/chat/completions", body)


def conversation(app: Any, *requests: Any) -> list[Any]:
    """The answers to requests that come at once."""

    async def run() -> list[Any]:
        async with app.router.lifespan_context(app):
            return await asyncio.gather(*(one(app) for one in requests))

    return asyncio.run(run())


def scene(number: int) -> tuple[Image.Image, str]:
    drawn = draw_scene(seed=3, index=number)
    (question,) = ask(drawn.objects, 1, np.random.default_rng(number))
    return Image.fromarray(drawn.image), question.text


def data_url(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(encoded(image, 'PNG')).decode()}"


def about(number: int, **settings: Any) -> dict[str, Any]:
    """A chat about a scene."""
    image, question = scene(number)
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image), "detail": "auto"}},
        {"type": "text", "text": question},
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 5, **settings}


@torch.no_grad()
def by_hand(demo: Any, number: int, num_keep: int) -> str:
    """The answer of `attach` and `generate`, alone."""
    model, processor = demo
    image, question = scene(number)
    inputs = processor(
        images=[image], text=[with_template(processor, question, 1)], return_tensors="pt"
    )
    with build_pruner("divprune", num_keep=num_keep)(model, processor=processor):
        made = model.generate(**inputs, do_sample=False, max_new_tokens=5)
    new = made[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(new, skip_special_tokens=True))


def events(answer: Any) -> list[dict[str, Any]]:
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.slow
def test_mixed_requests_at_once_are_answered_as_each_alone(served, demo):
    """Streamed or not, of three budgets, with the counts that were read; and the model is left."""
    app, worker = served()
    budgets = {0: None, 1: 4, 2: 100, 3: 4, 4: None, 5: 100}
    requests = []
    for number, num_keep in budgets.items():
        own = {} if num_keep is None else {"num_keep": num_keep}
        if number % 2:
            own |= {
                "stream": True,
                "stream_options": {"include_usage": True},
            }  # of OpenAI's clients
        requests.append(partial(post, chat=about(number, **own)))
    answers = conversation(app, *requests)
    for (number, num_keep), answer in zip(budgets.items(), answers, strict=True):
        kept = num_keep or 36
        assert answer.status == 200, answer.text
        if number % 2:
            first, *middle, last = events(answer)
            assert first["choices"][0]["delta"]["role"] == "assistant"
            text = "".join(one["choices"][0]["delta"]["content"] for one in middle)
            reason = last["choices"][0]["finish_reason"]
            assert answer.headers["content-type"].startswith("text/event-stream")
        else:
            last = json.loads(answer.text)
            (choice,) = last["choices"]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert text == by_hand(demo, number, kept)
        assert reason == "stop"
        assert last["ocvtp"] == {"visual_tokens": [144], "kept": [kept]}
        usage = last["usage"]
        assert usage["prompt_tokens"] < 144 - kept or kept == 100
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert not hasattr(demo[0], "_ocvtp_attachment")
    assert not worker.thread.is_alive()


@pytest.mark.slow
def test_several_images_none_and_several_turns(served):
    app, _ = served()
    one = about(0, num_keep=9)
    two = about(0, num_keep=9)
    two["messages"][0]["content"] += about(1)["messages"][0]["content"]
    turns = about(0)
    turns["messages"] += [
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "is there a red square?"}]},
    ]
    plain = {"messages": [{"role": "user", "content": "how many stars?"}], "max_tokens": 3}
    long = about(1, ignore_eos=True, max_completion_tokens=7)
    requests = [partial(post, chat=chat) for chat in (one, two, turns, plain, long)]
    found = [json.loads(answer.text) for answer in conversation(app, *requests)]
    assert [answer["ocvtp"]["kept"] for answer in found] == [[9], [9, 9], [36], [], [36]]
    assert found[1]["usage"]["prompt_tokens"] > found[0]["usage"]["prompt_tokens"] + 9
    assert found[4]["usage"]["completion_tokens"] == 7
    assert found[4]["choices"][0]["finish_reason"] == "length"


@pytest.mark.slow
def test_what_is_wrong_is_told_and_others_are_answered(served):
    """A fault of one request is its own alone, and has a status in streams too."""
    app, _ = served(max_images=2, max_new_tokens=3000, max_body_bytes=200_000)

    def with_url(url: str) -> dict[str, Any]:
        chat = about(0)
        chat["messages"][0]["content"][0]["image_url"]["url"] = url
        return chat

    many = about(0)
    many["messages"][0]["content"] *= 3
    wrong = {
        "is not served": (404, about(0, model="other")),
        "num_keep: Input should be greater than or equal to 1": (400, about(0, num_keep=0)),
        "temperature: Input should be less than or equal to 0": (400, about(0, temperature=0.7)),
        "tools: Extra inputs are not permitted": (400, about(0, tools=[])),
        "pass at most 3000": (400, about(0, max_tokens=3001)),
        "more than the 2048 that the model reads": (400, about(0, max_tokens=2040)),
        "image 0 is no data URL": (400, with_url("http://127.0.0.1/cat.png")),
        "image 0 cannot be read (it is no image of a known": (
            400, with_url("data:image/png;base64,AAAA"),
        ),
        "up to 2 images": (400, many),
        "stands for an image; leave it out": (
            400, {"messages": [{"role": "user", "content": "<image> what is it?"}]},
        ),
        "messages: List should have at least 1 item": (400, {"messages": []}),
        "more than 200000 bytes": (413, about(0, user="x" * 200_000)),
        "Invalid JSON": (400, b"{"),
    }  # fmt: skip
    asked = [
        chat if isinstance(chat, bytes) else chat | {"stream": number % 2 == 0}
        for number, (_, chat) in enumerate(wrong.values())
    ]
    right = [about(1), about(2, stream=True)]
    requests = [partial(post, chat=chat) for chat in (*asked, *right)]
    *answers, plain, streamed = conversation(app, *requests)
    for (text, (status, _)), answer in zip(wrong.items(), answers, strict=True):
        error = json.loads(answer.text)["error"]
        assert (answer.status, error["code"]) == (status, status), answer.text
        assert text in error["message"]
    assert plain.status == streamed.status == 200
    assert events(streamed)[-1]["choices"][0]["finish_reason"] == "stop"


def test_health_models_and_a_queue_that_is_full(served):
    app, worker = served(max_batch=1, max_waiting=1)

    async def asks(app: Any) -> Any:
        return await asyncio.gather(*(post(app, about(n)) for n in range(5)))

    async def get(app: Any) -> Any:
        return [await call(app, "GET", path) for path in ("/health", "/v1/models")]

    (health, models), answers = conversation(app, get, asks)
    facts = json.loads(health.text)
    assert (facts["status"], facts["pruner"], facts["num_keep"]) == ("ok", "divprune", 36)
    assert facts["batches"] <= facts["answered"] <= 5
    assert json.loads(models.text)["data"][0]["id"] == "demo"
    statuses = [answer.status for answer in answers]
    assert set(statuses) == {200, 429}
    refused = answers[statuses.index(429)]
    assert "try again later" in refused.text
    assert refused.headers["retry-after"] == "1"
    assert worker.waiting.empty()

    async def dead(app: Any) -> Any:
        await asyncio.to_thread(worker.stop)
        return await call(app, "GET", "/health")

    app, worker = served()
    (gone,) = conversation(app, dead)
    assert gone.status == 503


def test_a_batch_waits_for_those_that_were_answered_together(server, demo, monkeypatch):
    """But not for ever, and not for more than there were."""
    worker = server.Worker(*demo, build_pruner("divprune", num_keep=4), max_batch=6, max_waiting=9)
    worker._handle.remove()
    monkeypatch.setattr(server, "PATIENCE", 30)

    def late(*items: Any) -> None:
        threading.Timer(0.02, lambda: [worker.waiting.put(item) for item in items]).start()

    worker.ask(1)
    assert worker._next_batch(1) == [1]
    worker.ask(1)
    late(2, 3)
    assert worker._next_batch(3) == [1, 2, 3]
    for number in range(8):
        worker.ask(number)
    assert worker._next_batch(3) == [0, 1, 2, 3, 4, 5]
    late(None)
    assert worker._next_batch(6) == [6, 7, None]
    monkeypatch.setattr(server, "PATIENCE", 0.01)
    worker.ask(1)
    assert worker._next_batch(6) == [1]


def test_a_client_that_goes_away_ends_its_answer(server, served):
    app, worker = served()
    seen = []

    async def leaves(app: Any) -> None:
        question = server.Question(
            "USER: <image>\nwhat? ASSISTANT:", [scene(0)[0]], 4, 1000, True, seen.append
        )
        question.put = lambda piece: seen.append(piece) or setattr(question, "gave_up", True)
        worker.ask(question)

    conversation(app, leaves)  # ends when the worker has
    assert 1 <= len(seen) < 10


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_before_its_answer_ends_it(served, monkeypatch, stream):
    """Also one whose answer comes in one piece, and one that still waits for its first."""
    app, worker = served()
    asked, given = [], worker.ask
    monkeypatch.setattr(worker, "ask", lambda question: asked.append(question) or given(question))
    if stream:
        monkeypatch.setattr(worker.thread, "start", lambda: None)  # no piece comes
        monkeypatch.setattr(worker, "stop", lambda: None)
    chat = about(0, num_keep=4, ignore_eos=True, stream=stream) | {"max_tokens": 1000}
    body = [{"type": "http.request", "body": json.dumps(chat).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        while not body and not (asked and (stream or asked[0].tokens)):
            await asyncio.sleep(0.01)
        return body.pop() if body else {"type": "http.disconnect"}

    async def leaves(app: Any) -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        await app(scope | {"query_string": b""}, receive, send)

    async def send(message: dict[str, Any]) -> None: ...

    conversation(app, leaves)
    (question,) = asked
    assert question.gave_up
    assert len(question.tokens) < 900


def test_budgets_that_a_request_cannot_change_are_refused(server, demo):
    """A K that would be ignored is none."""
    pruner = build_pruner("fastv", stages=[[1, 8]])
    worker = server.Worker(*demo, pruner, 1, 1)
    chat = server.parse_chat(json.dumps(about(0, num_keep=4)).encode())
    try:
        with pytest.raises(server.Refused, match="no num_keep that a request could change"):
            server.check_chat(chat, worker, server.parse(["--model", "demo"]))
    finally:
        worker._handle.remove()


@pytest.mark.parametrize(
    "given",
    [
        {"num_keep": True},
        {"num_keep": "4"},
        {"num_keep": 4.0},
        {"max_tokens": True},
        {"stream": 1},
        {"temperature": False},
        {"n": True},
    ],
    ids=str,
)
def test_what_is_no_number_is_not_read_as_one(server, given):
    body = {"messages": [{"role": "user", "content": "who?"}], **given}
    (name,) = given
    with pytest.raises(server.Refused, match=rf"^{name}: Input should be a valid (int|bool|num)"):
        server.parse_chat(json.dumps(body).encode())


def test_faults_of_long_bodies_are_told_in_few_words(server):
    def refused(*messages: Any) -> str:
        with pytest.raises(server.Refused) as error:
            server.parse_chat(json.dumps({"messages": messages}).encode())
        return str(error.value)

    turn = {"role": "user", "content": "who?"}
    assert "messages: List should have at most 512 items" in refused(*[turn] * 513)
    text = {"type": "text", "text": ""}
    assert "List should have at most 128 items" in refused(
        {"role": "user", "content": [text] * 129}
    )
    told = refused(*[{"role": "nobody", "content": ""}] * 20)
    assert told.count("Input should be 'system'") == 8
    assert told.endswith("; and 12 more")
    assert len(refused({"role": "user", "content": [{"type": "t" * 9999}]})) < 1000
    with pytest.raises(server.Refused, match=r"^k{300}\.\.\.$"):
        server.parse_chat(json.dumps({"messages": [turn], "k" * 9999: 1}).encode())
    chat, limits = server.Chat(messages=[turn], model="m" * 9999), server.parse([])
    with pytest.raises(server.Refused, match=r"^model 'm{299}\.\.\. is not served; pass "):
        server.check_chat(chat, None, limits)


def test_a_body_is_read_before_its_request_is_refused(served, server, monkeypatch):
    """A client that still sends would not see the answer. But not for ever."""
    app, worker = served(max_body_bytes=10)
    parts = [b"x" * 8] * 9
    chats = "/v1/chat/completions"

    async def ask() -> list[Any]:
        said = await call(app, "POST", chats, *parts, content_length="72")
        unsaid = await call(app, "POST", chats, *parts)
        elsewhere = await call(app, "POST", "/v1/completions", *parts)
        monkeypatch.setattr(worker.waiting, "full", lambda: True)
        return [said, unsaid, elsewhere, await call(app, "POST", chats, *parts)]

    async def leaves() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(server.Refused, match="the body ended before all of it was sent"):
        asyncio.run(server.read_body(server.Request({"type": "http", "headers": []}, leaves), 9))
    answers = asyncio.run(ask())
    assert [(one.status, one.unread) for one in answers] == [(413, 0), (413, 0), (404, 0), (429, 0)]
    told = json.loads(answers[2].text)["error"]
    assert told["message"] == "POST /v1/completions: Not Found; see docs/serving.md."
    monkeypatch.setattr(server, "LINGER", 0.01)
    sent = []

    async def endless() -> dict[str, Any]:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    async def refuses(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start"})
        await send({"type": "http.response.body"})

    asyncio.run(server.WholeBodies(refuses)({"type": "http"}, endless, send))
    assert sent == ["http.response.start", "http.response.body"]


def test_a_long_prompt_is_refused_before_it_waits(served, server):
    """By as much of it as shows that it is too long."""
    _, worker = served()
    count, read = worker.counter, []
    worker.counter = lambda text, **how: read.append(len(text)) or count(text, **how)
    room = worker.context - 7
    worker.check_text("star " * room, 7)
    for text in ("star " * (room + 1), "star " * 1_000_000):
        read.clear()
        with pytest.raises(server.Refused, match=r"max_tokens=7 more than the 2048 that the model"):
            worker.check_text(text, 7)
        assert read == [min(len(text), server.SLICE)]
    chat = server.parse_chat(json.dumps(about(0, num_keep=4)).encode())
    chat.messages[0].content[1].text = text
    with pytest.raises(server.Refused, match="tokens or more, and with max_tokens=5"):
        server.as_question(chat, worker, server.parse([]), print)


def test_what_is_not_installed_is_said_in_one_line(server, monkeypatch):
    for name in ("uvicorn", "fastapi"):
        monkeypatch.setitem(sys.modules, name, None)
    message = (
        r"^examples/server.py: error: needs {}, which is missing; in a clone, pip install -e '."
    )
    with pytest.raises(SystemExit, match=message.format("uvicorn")):
        server.main([])
    with pytest.raises(SystemExit, match=message.format("fastapi")):
        runpy.run_path("examples/server.py")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-keep", "0"], "--num-keep 0; pass at least 1"),
        (["--pruner", "fps:num_keep=9", "--num-keep", "4"], "--num-keep 4 would not count: fps"),
        (["--pruner", "trim"], "pass --text-tower .*demo-vlm/clip, which lies in the model's"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--pruner", "fps:num_keep=9", "--model", "random:x"], "is unknown"),
        (["--model", "random:x"], "is unknown"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(server, monkeypatch, words, message):
    """In flags, and before the model is loaded."""

    def load(*_, **__):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load)
    monkeypatch.setitem(sys.modules, "uvicorn", SimpleNamespace())
    with pytest.raises(SystemExit, match=f"^examples/server.py: error: .*{message}"):
        server.main(words)


def test_a_pruner_that_reads_the_prompt_by_clip_is_served_with_it(server):
    words = ["--pruner", "trim", "--text-tower", "checkpoints/demo-vlm/clip"]
    worker = server.build_worker(server.parse(words))
    assert worker.pruner.name == "trim"
    worker._handle.remove()

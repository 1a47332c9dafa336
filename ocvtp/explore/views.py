"""What images are looked at with: a model that may be asked about them, or a tower alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ocvtp.bench import samples, timeline
from ocvtp.evaluation.judged import Judged
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.towers import TowerEncodings, TowerSubject
from ocvtp.explore.kept import (
    Looked,
    Stage,
    as_seen,
    check_prompt,
    in_model,
    on_tower,
    stages_of_run,
)
from ocvtp.hosts.attach import attached
from ocvtp.hosts.base import Savings, Tiling
from ocvtp.hosts.prompt.chat_template import find_tokenizer, with_template
from ocvtp.hosts.prompt.checks import refuse_beyond_all, refuse_beyond_context
from ocvtp.hosts.prompt.select import Select, select
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import find_host
from ocvtp.hosts.runtime.shared_encodings import SharedEncodings
from ocvtp.pruners import Compose, Pruner, build_pruner
from ocvtp.structures import Selection, VisualTokens

AnyPruner = Pruner | Compose
Tick = Callable[[], None]
CHOOSING = "choosing"
_CHOOSING_TIMED = (
    "Choosing is a pruner's own work on the tokens of one image, measured once an image after one"
    " that warms up. The tower ran once for all pruners, and is not in it."
)
_ALL = Savings(cut_tower=False, project_kept=False)


@dataclass(frozen=True, eq=False)
class Run:
    """What a pruner makes of an image.

    Args:
        stages: what is left.
        times: in milliseconds: `first`, to the first token, and its parts `tower`, `choosing`,
            `projector`, `model` and `other`; or `choosing` alone; or none.
        answer: to the prompt; None without one.
    """

    stages: Sequence[Stage]
    times: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None


class View(ABC):
    """What images are looked at with.

    Args:
        judged: the model, or the tower.
    """

    kind: ClassVar[Literal["model", "tower"]]
    prompts: Sequence[str] = ()
    """What is asked about every image."""
    time: str = CHOOSING
    """Which of `Run.times` stands for all."""
    timed: str
    """What times are, in a sentence."""

    def __init__(self, judged: Judged) -> None:
        self.name, self.device = judged.name, judged.device

    def check(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuse images of widths and heights that cannot be looked at.

        Raises:
            ValueError: if a prompt about one is too long.
        """
        del sizes

    @abstractmethod
    def num_tokens(self, image: Image.Image) -> int:
        """Visual tokens of an image."""

    @abstractmethod
    def prepare(self, pruners: Sequence[AnyPruner]) -> None:
        """Say which pruners there will be."""

    @abstractmethod
    def attempt(self, pruner: AnyPruner, image: Image.Image) -> None:
        """Run a pruner once, which also warms up what will be timed.

        Raises:
            ValueError: if it cannot run.
        """

    @abstractmethod
    def look(
        self, pruners: Sequence[AnyPruner], image: Image.Image, tick: Tick
    ) -> tuple[NDArray[np.uint8], list[list[Run]]]:
        """The image [H, W, 3] as the tower saw it; and a run of every pruner, of each prompt.

        Args:
            pruners: that can run. image: any. tick: called after each run.
        """

    def note(self, pruner: AnyPruner) -> str:
        """What a reader must know of a pruner."""
        del pruner
        return ""


class ModelView(View):
    """A VLM.

    Args:
        subject: the model.
        prompts: that it answers about every image; without any, it answers nothing.
        max_new_tokens: of an answer.
        tiling: its `budget`, see `ocvtp.attach`.
        shares: whether the tower runs once for all pruners, so that answers are not timed.
    """

    kind = "model"

    def __init__(
        self,
        subject: Subject,
        prompts: Sequence[str] = (),
        max_new_tokens: int = 32,
        tiling: Tiling | None = None,
        shares: bool = False,
    ) -> None:
        super().__init__(subject)
        self._subject, self.prompts, self._max_new_tokens = subject, prompts, max_new_tokens
        self._host, self._shares = find_host(subject.model, tiling), shares
        self._shared: SharedEncodings | None = None
        self.timed = _CHOOSING_TIMED
        if prompts:
            self.time = "first"
            self.timed = (
                "Time to the first token, from the processor's tensors on: one request of one image"
                " at a time, each with the tower, after one that warms up. With a pruner, what"
                " nobody reads of the tower and the projector does not run; unpruned, all of it"
                " does. For intervals, use ocvtp bench."
            )
            if shares:
                self.timed = "Nothing was timed: the tower ran once for all pruners."

    @cached_property
    def _longest_prompt(self) -> str:
        tokenizer = find_tokenizer(self._subject.processor)
        return max(self.prompts, key=lambda prompt: len(tokenizer(prompt)["input_ids"]))

    def check(self, sizes: Sequence[tuple[int, int]]) -> None:
        if not self.prompts:
            return
        unlike = list(dict.fromkeys(sizes))[: None if self._host.image_tokens is None else 1]
        for size in unlike:  # what is in an image makes a prompt no longer
            made, _ = self._inputs(Image.new("RGB", size), self._longest_prompt)
            refuse_beyond_context(self._host, made["input_ids"], self._max_new_tokens)

    def num_tokens(self, image: Image.Image) -> int:
        none = build_pruner("none")
        (stage,) = self._looked([none], image).stages[id(none)]
        return len(stage.cells)

    def _inputs(self, image: Image.Image, prompt: str) -> tuple[dict[str, Any], Any]:
        """What the processor made, on the CPU and where the model is."""
        text = with_template(self._subject.processor, prompt, 1)
        made = self._subject.processor(images=[image], text=[text], return_tensors="pt")
        return dict(made), made.to(self.device, self._subject.dtype)

    def prepare(self, pruners: Sequence[AnyPruner]) -> None:
        if self._shares:
            self._shared = SharedEncodings.of(self._subject.model, pruners)

    def attempt(self, pruner: AnyPruner, image: Image.Image) -> None:
        refuse_beyond_all(self._host, pruner)
        if self.prompts:
            self._answer(pruner, self._inputs(image, self.prompts[0])[1])
        else:
            check_prompt([pruner], None)
            self._silent([pruner], image)

    def look(
        self, pruners: Sequence[AnyPruner], image: Image.Image, tick: Tick
    ) -> tuple[NDArray[np.uint8], list[list[Run]]]:
        if not self.prompts:
            seen, runs = self._silent(pruners, image)
            for _ in runs:
                tick()
            return seen, [runs]
        rows: list[list[Run]] = []
        for prompt in self.prompts:
            pixels, inputs = self._inputs(image, prompt)
            rows.append([])
            for pruner in pruners:
                rows[-1].append(self._answer(pruner, inputs))
                tick()
        return as_seen(self._host, self._subject.processor, pixels), rows

    def _silent(
        self, pruners: Sequence[AnyPruner], image: Image.Image
    ) -> tuple[NDArray[np.uint8], list[Run]]:
        """Without a prompt."""
        stopwatch = _Stopwatch(self.device)
        looked = self._looked(pruners, image, stopwatch.select)
        return looked.seen, [Run(looked.stages[id(p)], stopwatch.times(p)) for p in pruners]

    def _looked(
        self, pruners: Sequence[AnyPruner], image: Image.Image, choose: Select = select
    ) -> Looked:
        subject = self._subject
        text = with_template(subject.processor, "", 1)
        tower = subject.text_tower
        return in_model(self._host, subject.processor, pruners, text, image, tower, choose)

    @torch.no_grad()
    def _answer(self, pruner: AnyPruner, inputs: Any) -> Run:
        model, processor = self._subject.model, self._subject.processor
        prompts: list[Prompt] = []
        marks = timeline.Marks(timeline.clock(self.device))
        tokens = timeline.Tokens(marks, self._max_new_tokens, 1, self.device)
        with attached(
            model,
            pruner,
            processor=processor,
            text_tower=self._subject.text_tower,
            on_prune=prompts.append,
            shared=self._shared,
            savings=_ALL if pruner.name == "none" and not self._shares else None,
            **asdict(self._host.tiling),
        ):
            with timeline.watching(self._host, pruner.parts, marks):
                timeline.synchronize(self.device)
                marks.start()
                output = model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=self._max_new_tokens,
                    stopping_criteria=[tokens],
                )
                marks.stop()
        timeline.synchronize(self.device)
        new = output[0, inputs["input_ids"].shape[1] :]
        answer = processor.decode(new, skip_special_tokens=True).strip()
        stages = stages_of_run(self._host, pruner, prompts[0])
        return Run(stages, {} if self._shares else _to_first(timeline.seconds(marks)), answer)


class TowerView(View):
    """A vision tower without a language model.

    Args:
        subject: the tower.
    """

    kind = "tower"
    timed = _CHOOSING_TIMED

    def __init__(self, subject: TowerSubject) -> None:
        super().__init__(subject)
        self._subject = subject
        self._shared: TowerEncodings | None = None

    def num_tokens(self, image: Image.Image) -> int:
        del image
        height, width = self._subject.encoder.grid_hw
        return height * width

    def prepare(self, pruners: Sequence[AnyPruner]) -> None:
        self._shared = self._subject.sharing(pruners)

    def attempt(self, pruner: AnyPruner, image: Image.Image) -> None:
        self._subject.fits(pruner)
        self.look([pruner], image, lambda: None)

    def look(
        self, pruners: Sequence[AnyPruner], image: Image.Image, tick: Tick
    ) -> tuple[NDArray[np.uint8], list[list[Run]]]:
        assert self._shared is not None, "see `prepare`"
        stopwatch = _Stopwatch(self.device)
        looked = on_tower(self._subject, pruners, image, self._shared, stopwatch.select)
        for _ in pruners:
            tick()
        return looked.seen, [[Run(looked.stages[id(p)], stopwatch.times(p)) for p in pruners]]

    def note(self, pruner: AnyPruner) -> str:
        return self._subject.note(pruner)


class _Stopwatch:
    """Times how long pruners choose."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[int, list[float]] = {}

    def select(self, pruner: Pruner, tokens: VisualTokens) -> Selection:
        with timeline.wall_clock(self._device, self._seconds.setdefault(id(pruner), [])):
            return select(pruner, tokens)

    def times(self, pruner: AnyPruner) -> dict[str, float]:
        """See `Run`; none of a pruner that did not choose here."""
        found = self._seconds.get(id(pruner.parts[0]), [])
        return {CHOOSING: 1e3 * found[-1]} if found else {}


def _to_first(took: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds to the first token, from seconds of every stage."""
    names = {
        "tower": samples.TOWER,
        CHOOSING: samples.SELECT,
        "projector": samples.PROJECT,
        "model": samples.MODEL,
        "other": samples.AROUND,
    }
    parts = {name: 1e3 * took[stage] for name, stage in names.items()}
    return {"first": sum(parts.values()), **parts}

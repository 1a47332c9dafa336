"""Where is it? Objects to be found by their boxes: drawn ones, COCO's, or those of a file.

Boxes are x1, y1, x2, y2 in pixels of the upright image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ocvtp.choices import Coordinates, Level, Split
from ocvtp.data.grounding import OBJECT, PROMPT, Box, check_prompt, coco_sought, seek
from ocvtp.evaluation.tasks.base import Item, Ratio, Record, Supplied, Task, shares
from ocvtp.evaluation.tasks.box_answers import LEAST_OVERLAP, overlap, parse_box
from ocvtp.evaluation.tasks.box_frames import Frames, Size
from ocvtp.evaluation.tasks.coco_instances import CocoInstances
from ocvtp.evaluation.tasks.drawn import DrawnTask, edge_of
from ocvtp.evaluation.tasks.question_files import (
    Asked,
    Entry,
    Folders,
    ListedTask,
    fingerprint,
    locate_images,
    read_entries,
)
from ocvtp.evaluation.tasks.registry import register_task
from ocvtp.images import upright_size

ACCURACY, IOU, PARSED = f"acc@{LEAST_OVERLAP}", "iou", "parsed"
_STREAM = 5  # of random numbers, beside those of other tasks
_BEYOND = 0.5  # pixels that a rounded edge may be outside of its image


class BoxTask(Task):
    """Questions that are answered by a box, of whichever images.

    Figures, of `all` and of each kind: `all/acc@0.5`, the share of answers whose box fits with an
    intersection over union of at least 0.5; `all/iou`, its mean; `all/parsed`, the share that has a
    box at all. One without has an IoU of 0.

    Attributes:
        frames: what turns the numbers of answers into pixels.
    """

    max_new_tokens: ClassVar[int] = 64
    metrics = (f"all/{ACCURACY}", f"all/{IOU}", f"all/{PARSED}")
    not_judged: ClassVar[tuple[str, ...]] = (f"all/{PARSED}",)
    frames: Frames

    def image_size(self, owner: int) -> Size:
        """Width and height of an image, upright."""
        width, height = self.image(owner).size
        return width, height

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        found = [self._found(item, one) for item, one in zip(self.items, records, strict=True)]
        figures: dict[str, list[float]] = {
            ACCURACY: [iou is not None and iou >= LEAST_OVERLAP for iou in found],
            IOU: [iou or 0.0 for iou in found],
            PARSED: [iou is not None for iou in found],
        }
        return {
            f"{group}/{name}": ratio
            for name, values in figures.items()
            for group, ratio in shares(self.items, values).items()
        }

    def _found(self, item: Item, record: Record) -> float | None:
        """How well the box of an answer fits the best of the right ones; None without a box."""
        said = parse_box(str(record["answer"]))
        if said is None:
            return None
        shown = record.get("shown")
        box = self.frames.in_image(
            said, self.image_size(item.owner), None if shown is None else (shown[0], shown[1])
        )
        return max(overlap(box, right) for right in map(parse_box, item.answers) if right)


@register_task("grounding")
class GroundingTask(BoxTask, DrawnTask):
    """Where is the red circle? On drawn scenes, on COCO's images, or as a file asks; boxes answer.

    On drawn scenes every object is asked for that its colour and shape tell from all others, or its
    size beside these; kinds are the levels. Figures: see `BoxTask`.

    Args:
        levels: of the scenes.
        split: `test`, or `val` where something is tuned by the figures.
        num_images: scenes of each level.
        questions: on each, at most.
        seed: of the scenes and questions.
        size: pixels of an edge.
        prompt: what is asked; {object} stands for what is looked for.
        frames: what turns the numbers of answers into pixels; None: they are pixels, or parts
            where all are from 0 to 1.

    Raises:
        ValueError: if a level or split is unknown, a number is out of range, or the prompt names
            no {object}.
    """

    def __init__(
        self,
        levels: Sequence[Level] = ("easy", "hard"),
        split: Split = "test",
        num_images: int = 500,
        questions: int = 4,
        seed: int = 0,
        size: int = 96,
        prompt: str = PROMPT,
        frames: Frames | None = None,
    ) -> None:
        check_prompt(prompt)
        self.prompt, self.frames = prompt, frames or Frames()
        super().__init__(levels, split, num_images, questions, seed, size)

    @classmethod
    def from_command(
        cls,
        supplied: Supplied,
        *,
        questions_file: Annotated[
            Sequence[str] | None,
            "a JSON list of {image, question, box: [x1, y1, x2, y2]} in pixels",
        ] = None,
        instances: Annotated[
            str | None, "COCO's instances: asks for what an image has one of"
        ] = None,
        images: Annotated[
            Sequence[str] | None, "folders of the images; else scenes are drawn"
        ] = None,
        levels: Annotated[Sequence[Level], "of drawn scenes"] = ("easy", "hard"),
        split: Annotated[Split, "of drawn scenes"] = "test",
        num_images: Annotated[
            int | None, "drawn scenes of each of --levels (default: 500), else the first images"
        ] = None,
        questions: Annotated[int, "on an image, at most, where no file has them"] = 4,
        prompt: Annotated[
            str, "what is asked; {object} is looked for"
        ] = "Where is the {object}? Answer with its box.",
        coordinates: Annotated[
            Coordinates, "the numbers of answers: auto is what models of this family say"
        ] = "auto",
        suffix: Annotated[str, "put after every question"] = "",
        seed: Annotated[int, "of scenes and questions"] = 0,
        outside: Annotated[bool, "names and links may lead out of --images"] = False,
    ) -> BoxTask:
        frames = Frames(supplied.load() if supplied.load else None, coordinates)
        if questions_file is None and instances is None:
            if images is not None:
                supplied.given("instances", instances, "COCO's annotations, or --questions-file")
            edge, count = edge_of(supplied), 500 if num_images is None else num_images
            return cls(levels, split, count, questions, seed, edge, f"{prompt}{suffix}", frames)
        if questions_file is not None:
            if len(questions_file) != 1:
                given = " ".join(questions_file)
                raise ValueError(f"--questions-file {given}: grounding reads one file; pass one.")
            asked, folders = read_asked(questions_file[0]), images or Path(questions_file[0]).parent
        else:
            folders = supplied.given("images", images, "the folders of the images")
            coco = CocoInstances(supplied.given("instances", instances, "COCO's annotations"))
            asked = coco_asked(coco, folders, prompt, questions, seed, num_images, outside)
        return ListedGrounding(asked, folders, frames, instances, suffix, num_images, outside)

    def describe(self) -> dict[str, Any]:
        own = {"prompt": self.prompt, "coordinates": self.frames.coordinates}
        return {**super().describe(), **own}

    def _ask(self, owner: int) -> list[Item]:
        level, index = self._place(owner)
        sought = seek(self._scene(owner).objects, self.questions, self._random(owner, _STREAM))
        return [
            Item(
                f"{level}/{index}/{n}",
                owner,
                asked_for(self.prompt, one.name),
                (box_text(one.box),),
                f"{level}/{one.size}",
            )
            for n, one in enumerate(sought)
        ]


class ListedGrounding(BoxTask, ListedTask):
    """The same about images in folders.

    Args:
        asked: questions whose answers are boxes, see `box_text`.
        images: folder or folders of the images, see `ListedTask`.
        frames: what turns the numbers of answers into pixels.
        instances: COCO `instances` file, for `masks`; they are known where each object of every
            image that is asked about has one.
        suffix: put after every question.
        limit: use only the first `limit` images.
        outside: whether images may lie outside of the folders, see `ListedTask`.

    Raises:
        ValueError: as `ListedTask`; and if a box is not inside of its image, in pixels.
    """

    name = "grounding"

    def __init__(
        self,
        asked: Sequence[Asked],
        images: Folders,
        frames: Frames | None = None,
        instances: str | Path | None = None,
        suffix: str = "",
        limit: int | None = None,
        outside: bool = False,
    ) -> None:
        super().__init__(asked, images, suffix, limit, outside)
        self.frames = frames or Frames()
        self._instances = None if instances is None else CocoInstances(instances)
        self._known = self._instances is not None and all(
            self._instances.knows_masks(name) for name in self.image_names
        )
        self._sizes: dict[int, Size] = {}
        for item in self.items:
            self._check_boxes(item)

    def _check_boxes(self, item: Item) -> None:
        width, height = self.image_size(item.owner)
        for answer in item.answers:
            box = parse_box(answer)
            assert box is not None, answer
            over = max(-box[0], -box[1], box[2] - width, box[3] - height)
            if over > _BEYOND or max(box) <= 1:
                where = "is outside of" if over > _BEYOND else "is less than a pixel of"
                raise ValueError(
                    f"question {item.key} has the box {answer}, which {where} its image"
                    f" {self.image_names[item.owner]}, {width} x {height} pixels; pass [x1, y1, x2,"
                    " y2] in pixels of the upright image (no parts or thousandths of it), cut off"
                    " at its edges."
                )

    def image_size(self, owner: int) -> Size:
        if owner not in self._sizes:
            self._sizes[owner] = upright_size(self._paths[owner])
        return self._sizes[owner]

    def describe(self) -> dict[str, Any]:
        known = self._instances
        kept = known and fingerprint([known.path.name, known.path.stat().st_size])
        own = {"coordinates": self.frames.coordinates, "instances": kept}
        return {**super().describe(), **own}

    def masks(self, owner: int) -> NDArray[np.bool_] | None:
        """[O, H, W] masks on the upright image, without crowds; None where not all are known."""
        if self._instances is None or not self._known:
            return None
        return self._instances.masks_of_file(self.image_names[owner], self._paths[owner])


def asked_for(prompt: str, name: str) -> str:
    """The question for an object."""
    return prompt.replace(OBJECT, name)


def box_text(box: Box) -> str:
    """A box as the answer of an item, in pixels: `[12, 30, 24, 42]`."""
    return f"[{', '.join(f'{edge:.6g}' for edge in box)}]"


def read_asked(file: str | Path) -> list[Asked]:
    """The questions of a file: a JSON list, or JSON lines.

    Every entry has `image`, `question`, and `box` or `answer`, [x1, y1, x2, y2] in pixels of the
    upright image, as a list or as a text; or a list of these, `answers`, of which any is right.
    `kind` groups them.

    Raises:
        ValueError: if the file is missing, or an entry lacks a part or a readable box.
    """
    return [_asked(entry) for entry in read_entries(file)]


def coco_asked(
    coco: CocoInstances,
    images: Folders,
    prompt: str = PROMPT,
    questions: int = 4,
    seed: int = 0,
    limit: int | None = None,
    outside: bool = False,
) -> list[Asked]:
    """Questions for what a COCO image has just one of; kinds are COCO's sizes.

    Args:
        coco: the file. images: folder or folders of its images.
        prompt: what is asked. questions: on an image, at most.
        seed: of which are asked for.
        limit: use only the first `limit` images that have such objects.
        outside: see `ListedTask`.

    Raises:
        ValueError: if there is none, an image is missing or of another shape, or a number is wrong.
    """
    check_prompt(prompt)
    if questions < 1 or seed < 0 or (limit is not None and limit < 1):
        raise ValueError(
            f"{questions=}, {seed=}, num_images={limit}: pass at least one question and image, and"
            " a seed of 0 or more."
        )
    sought = {name: coco_sought(coco.objects(name), coco.names) for name in coco.image_ids}
    chosen = [name for name, some in sought.items() if some][:limit]
    if not chosen:
        raise ValueError(f"{coco.path} has no image with a single object of a kind and its box.")
    asked = []
    for name, path in zip(chosen, locate_images(chosen, images, outside), strict=True):
        random = np.random.default_rng([seed, coco.image_ids[name], _STREAM])
        some = [sought[name][n] for n in random.permutation(len(sought[name]))[:questions]]
        boxes = coco.upright_boxes(name, [one.box for one in some], path)
        asked += [
            Asked(
                f"{name}/{one.name}", name, asked_for(prompt, one.name), (box_text(box),), one.size
            )
            for one, box in zip(some, boxes, strict=True)
            if overlap(box, box) > 0 and max(box) > 1  # it is seen
        ]
    return asked


def _as_text(value: Any) -> str:
    """A box as a list, or as a text."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _asked(entry: Entry) -> Asked:
    content = entry.content
    given = next((content[key] for key in ("box", "answer") if key in content), None)
    listed = content.get("answers", [given])
    answers = [_as_text(one) for one in (listed if isinstance(listed, list) else [listed])]
    for answer in answers or [""]:
        box = parse_box(answer)
        if box is None or overlap(box, box) == 0:
            raise ValueError(
                f"{entry.where} has {answer or None!r} as its box; pass [x1, y1, x2, y2] in pixels"
                " of the upright image, with x1 < x2 and y1 < y2."
            )
    kind = entry.text("kind") if "kind" in content else ""
    if kind.split("/")[-1] == "all":
        raise ValueError(f"{entry.where} has the kind {kind!r}; 'all' is the sum: rename it.")
    question, image = entry.text("question"), entry.text("image")
    return Asked(str(entry.number), image, question, tuple(answers), kind)

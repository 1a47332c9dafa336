"""POPE: is there an object in the image? Official files, and sets built from COCO instances.

Paper: https://arxiv.org/abs/2305.10355.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ocvtp.data.existence import (
    NEGATIVES,
    Negatives,
    absent_thing,
    counts_together,
    existence_question,
)
from ocvtp.evaluation.tasks.answers import exact_yes_no, pope_yes_no
from ocvtp.evaluation.tasks.base import Item, Ratio, Record, Supplied
from ocvtp.evaluation.tasks.coco_instances import CocoInstances
from ocvtp.evaluation.tasks.question_files import (
    Asked,
    Entry,
    Folders,
    ListedTask,
    fingerprint,
    read_entries,
)
from ocvtp.evaluation.tasks.registry import register_task
from ocvtp.reporting.files import replacing

Files = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
SPLITS = NEGATIVES
pope_question = existence_question
NUM_POSITIVES = 3  # of an image, each followed by a negative


@register_task("pope")
class PopeTask(ListedTask):
    """POPE's questions, of one split or more.

    A file has lines of `{"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
    "text": "Is there a snowboard in the image?", "label": "yes"}`.

    Args:
        files: by split; or one or more files whose names end with the split
            (`coco_pope_random.json` is `random`).
        images: folder or folders of the images, see `ListedTask`. Those of the official files,
            val2014, are spread over train2017 and val2017.
        suffix: put after every question; LLaVA's own evaluation has a new line and "Answer the
            question using a single word or phrase.".
        instances: COCO `instances` file, for `masks`; they are known where each object of every
            image that is asked about has one.
        limit: use only the first `limit` images.
        outside: whether images may lie outside of the folders, see `ListedTask`.

    Raises:
        ValueError: if a file or an image is missing, if an entry lacks a key or has another label
            than yes or no, or if two files are of one split.
    """

    lmms: ClassVar[str] = "pope"

    def __init__(
        self,
        files: Files,
        images: Folders,
        suffix: str = "",
        instances: str | Path | None = None,
        limit: int | None = None,
        outside: bool = False,
    ) -> None:
        splits = _by_split(files)
        asked = [
            _asked(split, entry) for split, path in splits.items() for entry in read_entries(path)
        ]
        super().__init__(asked, images, suffix, limit, outside)
        self.metrics = tuple(f"{group}/accuracy" for group in ("all", *splits))
        self._instances = None if instances is None else CocoInstances(instances)
        self._known = self._instances is not None and all(
            self._instances.knows_masks(name) for name in self.image_names
        )

    @classmethod
    def from_command(
        cls,
        supplied: Supplied,
        *,
        images: Annotated[Sequence[str] | None, "folders of the images"] = None,
        questions_file: Annotated[Sequence[str] | None, "POPE's JSON lines"] = None,
        instances: Annotated[
            str | None,
            "COCO's instances: masks for the oracle, and the questions without --questions-file",
        ] = None,
        suffix: Annotated[str, "put after every question"] = "",
        num_images: Annotated[int | None, "the first ones (default: all)"] = None,
        seed: Annotated[int, "of the questions that are built"] = 0,
        outside: Annotated[bool, "names and links may lead out of --images"] = False,
    ) -> PopeTask:
        files: Files
        if questions_file is None:
            what = "COCO's annotations of the images, or --questions-file, POPE's own questions"
            source = supplied.given("instances", instances, what)
            files = build_pope(source, supplied.folder / "pope", num_images, seed)
            num_images = None
        else:
            files = questions_file
        folders = supplied.given("images", images, "the folders of the images")
        return cls(files, folders, suffix, instances, num_images, outside)

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        return pope_ratios(self.items, self.answers(records))

    def describe(self) -> dict[str, Any]:
        known = self._instances
        kept = known and fingerprint([known.path.name, known.path.stat().st_size])
        return {**super().describe(), "instances": kept}

    def masks(self, owner: int) -> NDArray[np.bool_] | None:
        """[O, H, W] masks on the upright image, without crowds; None where not all are known."""
        if self._instances is None or not self._known:
            return None
        return self._instances.masks_of_file(self.image_names[owner], self._paths[owner])


def pope_ratios(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Ratio]:
    """POPE's figures; yes is positive.

    Args:
        items: with the answer `yes` or `no`, and the split as their kind.
        answers: to the items.

    Returns:
        Of `all` and each split, e.g. `popular/f1`: `accuracy`, `precision` TP/(TP+FP), `recall`
        TP/(TP+FN), `f1` 2TP/(2TP+FP+FN) and `yes_ratio`, the share of the answers that is yes, all
        by the official parser; and `exact`, the accuracy of answers that are yes or no and nothing
        else.
    """
    label = np.array([item.answers[0] for item in items], np.str_)
    true = label == "yes"
    said = np.array([pope_yes_no(answer) == "yes" for answer in answers], np.bool_)
    exact = np.array([exact_yes_no(answer) or "" for answer in answers], np.str_) == label
    hit, every = true & said, np.ones(len(items))
    figures = {
        "accuracy": (true == said, every),
        "precision": (hit, said),
        "recall": (hit, true),
        "f1": (2.0 * hit, 1.0 * true + said),
        "yes_ratio": (said, every),
        "exact": (exact, every),
    }
    owners = np.array([item.owner for item in items], np.int64)
    kinds = np.array([item.kind for item in items], np.str_)
    groups = {"all": np.ones(len(items), np.bool_)}
    groups |= {kind: kinds == kind for kind in dict.fromkeys(kinds.tolist())}
    return {
        f"{group}/{name}": Ratio(
            hits[rows].astype(np.float64), of[rows].astype(np.float64), owners[rows]
        )
        for group, rows in groups.items()
        for name, (hits, of) in figures.items()
    }


def build_pope(
    instances: str | Path, output: str | Path, num_images: int | None = None, seed: int = 0
) -> dict[str, Path]:
    """Write POPE's three splits from a COCO `instances` file, in the official format.

    Used are images with at least three objects (and three categories that are absent). The first
    three objects listed are asked for, each followed by one that is absent and was not asked for
    yet: in `random` any; in `popular` the one that most images of the file have; in `adversarial`
    the one that most images have together with the object before it. Where there is none with a
    count above zero the last two take any. Equally frequent ones go by the file's order. What is
    random depends on the seed, the image's number and the split alone.

    Args:
        instances: the file; counts are over all of its images.
        output: folder of `coco_pope_random.json`, `coco_pope_popular.json` and
            `coco_pope_adversarial.json`; written over.
        num_images: this many images drawn at random; None for all. The official sets have 500.
        seed: not negative.

    Returns:
        The files by split, as `PopeTask` takes them.

    Raises:
        ValueError: if the file is no `instances` file or has too few such images.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; pass 0 or more.")
    coco = CocoInstances(instances)
    chosen = _choose_images(coco, num_images, seed)
    together = counts_together(coco.categories, coco.present.values())
    paths: dict[str, Path] = {}
    for number, split in enumerate(SPLITS):
        questions: list[dict[str, Any]] = []
        for name in chosen:
            rng = np.random.default_rng([seed, coco.image_ids[name], number])
            for thing, label in _objects(split, coco, coco.present[name], together, rng):
                entry = {"question_id": len(questions) + 1, "image": name}
                questions.append({**entry, "text": pope_question(thing), "label": label})
        paths[split] = Path(output) / f"coco_pope_{split}.json"
        with replacing(paths[split]) as temporary:
            temporary.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    return paths


def _choose_images(coco: CocoInstances, num_images: int | None, seed: int) -> list[str]:
    """Names of images with enough objects present and absent, in the file's order."""
    most = len(coco.categories) - NUM_POSITIVES
    usable = [n for n, objects in coco.present.items() if NUM_POSITIVES <= len(objects) <= most]
    if not usable or (num_images is not None and not 1 <= num_images <= len(usable)):
        wanted = "" if num_images is None else f", not num_images={num_images}"
        raise ValueError(
            f"{coco.path} has {len(usable)} images of {NUM_POSITIVES} objects and as many absent "
            f"categories{wanted}; pass 1 to that many, or another file."
        )
    drawn = np.random.default_rng(seed).permutation(len(usable))[:num_images]
    return [usable[n] for n in sorted(drawn.tolist())]


def _objects(
    split: Negatives,
    coco: CocoInstances,
    present: Sequence[str],
    together: NDArray[np.int64],
    rng: np.random.Generator,
) -> Iterator[tuple[str, str]]:
    """The six objects that are asked for in one image, with their labels."""
    free = np.array([name not in present for name in coco.categories])  # [C] absent, not yet asked
    for positive in present[:NUM_POSITIVES]:
        number = coco.categories.index(positive)
        negative = absent_thing(split, number, together, free, rng)
        free[negative] = False
        yield positive, "yes"
        yield coco.categories[negative], "no"


def _by_split(files: Files) -> dict[str, Path]:
    if isinstance(files, Mapping):
        named = [(split, Path(path)) for split, path in files.items()]
    else:
        paths = [Path(path) for path in ([files] if isinstance(files, str | Path) else files)]
        named = [(path.stem.rsplit("_", 1)[-1], path) for path in paths]
    splits = dict(named)
    if not named or len(splits) < len(named) or "all" in splits:
        raise ValueError(
            f"POPE files are of the splits {[split for split, _ in named]}; pass at least one "
            "file, each of its own split, none of them 'all': {'random': FILE, ...}, or files "
            "that are called ..._random.json and so on."
        )
    return splits


def _asked(split: str, entry: Entry) -> Asked:
    number, label = entry.content.get("question_id"), entry.text("label")
    if not isinstance(number, int | str):
        raise ValueError(f"{entry.where} has {number!r} as 'question_id'; pass a number.")
    if label not in ("yes", "no"):
        raise ValueError(f"{entry.where} has the label {label!r}; pass 'yes' or 'no'.")
    return Asked(f"{split}/{number}", entry.text("image"), entry.text("text"), (label,), split)

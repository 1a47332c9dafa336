"""What a task is run under: every pruner at every budget, and the controls."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ocvtp.choices import Positions
from ocvtp.evaluation.labels import (
    DOWNSAMPLE,
    ORACLE,
    ORIGINAL,
    SHUFFLED,
    UNPRUNED,
    UNTRAINED,
)
from ocvtp.evaluation.oracle import Oracle
from ocvtp.learning.artifact import CONFIG_NAME, WEIGHTS_NAME
from ocvtp.pruners import Pruner, build_pruner, pruner_class, trainable
from ocvtp.pruners.budgets import BUDGETS
from ocvtp.pruners.budgets import Budget as Budget
from ocvtp.pruners.registry import checked_settings
from ocvtp.pruners.specs import (
    build_spec,
    known_settings,
    names_budget,
    parse_spec,
    refuse_unread,
    refuse_without_amount,
    runs_once,
    with_budget,
)

_SEED_STEP = 1_000_003  # more than there are items


@dataclass(frozen=True)
class Place:
    """What a pruner may be made from: the batch that it will see.

    Args:
        start: number of its first item.
        seen: of each row [O, H, W] bool, the objects in the picture that the tower sees.
    """

    start: int
    seen: Callable[[], Sequence[NDArray[np.bool_]]]


@dataclass(frozen=True)
class Condition:
    """One pruner at one budget with one seed.

    Args:
        label: of the row in tables. budget: None where nothing is pruned, or by the method itself.
        make: the pruner for a batch.
        settings: what answers depend on, as JSON.
        control: whether it only serves to compare. yours: whether it is a method of the user's.
        seed: of what is random, or number of the checkpoint.
        image: `own`; `other`: that of the next item that has another; or `smaller`: the own one
            at the size of which the model makes about `budget` tokens.
        trained: whether it learned from data.
        positions: of the tokens that are left, see `ocvtp.attach`; None is what the pruner was
            trained with, and else contiguous.
    """

    label: str
    budget: Budget | None
    make: Callable[[Place], Pruner]
    settings: dict[str, Any]
    control: bool = False
    seed: int = 0
    image: Literal["own", "other", "smaller"] = "own"
    trained: bool = False
    yours: bool = False
    positions: Positions | None = None

    @property
    def key(self) -> str:
        """The name that tells it from the others."""
        budget = "" if self.budget is None else f" @ {self.budget}"
        return f"{self.label}{budget} # {self.seed}"


def at_positions(found: Sequence[Condition], positions: Sequence[Positions]) -> list[Condition]:
    """Conditions with the tokens that are left at each of these positions.

    Original positions have labels of their own. What drops nothing is as it was, once.

    Args:
        found: all conditions. positions: to try; none: those that each pruner was trained with.

    Raises:
        ValueError: for others.
    """
    if wrong := [one for one in positions if one not in get_args(Positions)]:
        raise ValueError(f"positions={wrong[0]!r}; pass 'contiguous' or 'original'.")
    if not positions:
        return list(found)
    made = []
    for condition in found:
        if condition.label in (UNPRUNED, SHUFFLED, DOWNSAMPLE):
            made.append(condition)
            continue
        for name in dict.fromkeys(positions):
            label = condition.label + (ORIGINAL if name == "original" else "")
            settings = condition.settings | {"positions": name}
            made.append(
                dataclasses.replace(condition, label=label, settings=settings, positions=name)
            )
    return made


UNPRUNED_KEY = f"{UNPRUNED} # 0"
"""Of the unpruned model, see `Condition.key`."""


def unpruned_conditions() -> list[Condition]:
    """All tokens, of the right image and of a wrong one."""
    none = build_pruner("none")
    return [
        Condition(UNPRUNED, None, lambda place: none, {}, True),
        Condition(SHUFFLED, None, lambda place: none, {}, True, image="other"),
    ]


def downsample_conditions(budgets: Sequence[Budget]) -> list[Condition]:
    """All tokens of an image that was made smaller."""
    none = build_pruner("none")
    return [
        Condition(DOWNSAMPLE, b, _always(none), b.settings(), True, image="smaller")
        for b in budgets
    ]


def pruner_conditions(
    spec: str,
    budgets: Sequence[Budget],
    seeds: Sequence[int],
    checkpoints: Sequence[str],
    num_tokens: int,
    label: str = "",
) -> list[Condition]:
    """A pruner at every budget; with every seed or every checkpoint, if it takes them.

    Args:
        spec: see `build_spec`; a K in its settings stands for the tokens of the budget, e.g.
            `fastv:stages=[[1,K]]`. With a budget of its own, see `has_budget`, it runs once.
        budgets: see `Budget`; none: it runs once if it needs none. seeds: of what is random.
        checkpoints: exported networks; it is run with those that it can read.
        num_tokens: of an image.
        label: of its rows; the spec where it has none.

    Raises:
        ValueError: for what `build_spec` refuses.
    """
    known, (_, own) = known_settings(spec), parse_spec(spec)
    of_budget = names_budget(spec)
    made: list[Condition] = []
    for budget in [None] if runs_once(spec, bool(budgets)) else budgets:
        shared, exact = {} if budget is None else budget.settings(), spec
        if budget is not None and of_budget:
            exact = with_budget(spec, budget.count(num_tokens))
        variants: list[dict[str, Any]] = [{}]
        if takes_checkpoints(spec):
            own_kind = readable(spec, checkpoints)
            variants = [{"checkpoint": path} for path in own_kind] or variants
        elif "seed" in known and "seed" not in own:
            variants = [{"seed": seed} for seed in seeds]
        for number, variant in enumerate(variants):
            settings = {"pruner": exact, **shared, **variant}
            path = variant.get("checkpoint", own.get("checkpoint"))
            if path is not None:
                settings["weights"] = content_hash(path)
            status = build_spec(exact, **shared, **variant).status
            made.append(
                Condition(
                    label or spec,
                    budget,
                    _maker(exact, shared, variant),
                    settings,
                    control=status == "control",
                    seed=number,
                    trained=path is not None,
                    yours=status == "yours",
                )
            )
    return made


def check_specs(
    specs: Sequence[str],
    budgets: Sequence[Budget],
    checkpoints: Sequence[str] = (),
    *,
    controls: bool = False,
    untrained: bool = False,
    given: bool = True,
) -> list[Pruner]:
    """Make pruners before a model is loaded, so that what is wrong with them is told at once.

    Args:
        specs: of them. budgets: see `check_asked`. checkpoints: see there. controls: see there.
        untrained: whether those that lack a network are given one that fits the model.
        given: see there.

    Returns:
        each pruner at each budget, as far as they can be made without a model: not those without a
        network, and not where a K stands for a share.

    Raises:
        ValueError: for what `check_asked` and `build_spec` refuse.
    """
    check_asked(specs, budgets, checkpoints, controls=controls, given=given)
    found = []
    for spec in specs:
        if untrained and not checkpoints and lacks_network(spec):
            name, own = parse_spec(with_budget(spec, 1))
            checked_settings(pruner_class(name), own)
            continue
        counts = [b for b in budgets if b.num_keep is not None or not names_budget(spec)]
        made = pruner_conditions(spec, counts, [0], checkpoints, 0)
        found += [condition.make(Place(0, list)) for condition in made]
    return found


def check_asked(
    specs: Sequence[str],
    budgets: Sequence[Budget],
    checkpoints: Sequence[str] = (),
    *,
    controls: bool = False,
    given: bool = True,
) -> None:
    """Refuse unknown pruners, and budgets and checkpoints that are wrong, missing or do not count.

    Args:
        specs: of the pruners. budgets: of those that say none; none where each says its own.
        checkpoints: exported networks, for those that take one.
        controls: whether what runs beside them reads the budgets, and the sizes of the networks.
        given: whether budgets were asked for, and are not those that a command has of its own.

    Raises:
        ValueError: for the first.
    """
    for spec in specs:
        known_settings(spec)
    for budget in budgets:
        budget.checked("every pruner")
    if not budgets:
        refuse_without_amount(specs)
    elif specs and given and not controls:
        shared = {n: [k for b in budgets if (k := getattr(b, n)) is not None] for n in BUDGETS}
        refuse_unread(specs, **{name: values or None for name, values in shared.items()})
    read = [path for path in checkpoints if controls and trainable.readers(path)]
    others = [path for path in checkpoints if path not in read]
    refuse_unread(specs, checkpoint=others or None)
    _refuse_of_others(specs, others)


def _refuse_of_others(specs: Sequence[str], checkpoints: Sequence[str]) -> None:
    """Refuse a network that no pruner reads, where they read another one."""
    takers = [spec for spec in specs if takes_checkpoints(spec)]
    read = {path for spec in takers for path in readable(spec, checkpoints)}
    if others := [path for path in checkpoints if path not in read]:
        owners = " or ".join(trainable.readers(others[0]))
        raise ValueError(
            f"checkpoint={others[0]!r} would not count: it is a network of pruner {owners}, and"
            f" {', '.join(specs)} is none; name that too, or leave it out."
        )


def lacks_network(spec: str) -> bool:
    """Whether a pruner takes a trained network that its spec does not say."""
    name, own = parse_spec(spec)
    takes = issubclass(pruner_class(name), trainable.TrainablePruner)
    return takes and not {"network", "checkpoint"} & set(own)


def takes_checkpoints(spec: str) -> bool:
    """Whether a pruner is run with each of the given checkpoints."""
    takes = "checkpoint" in known_settings(spec)
    return takes and not {"checkpoint", "network"} & set(parse_spec(spec)[1])


def readable(spec: str, checkpoints: Sequence[str]) -> list[str]:
    """Those of several checkpoints that are not known to be another pruner's own.

    If that leaves none, all of them: the pruner then says what is wrong with them.
    """
    name = spec.partition(":")[0]
    if not issubclass(pruner_class(name), trainable.TrainablePruner):
        return list(checkpoints)
    kinds = {path: trainable.readers(path) for path in checkpoints}
    own = [path for path, names in kinds.items() if not names or name in names]
    return own or list(checkpoints)


def _maker(spec: str, shared: dict[str, Any], variant: dict[str, Any]) -> Callable[[Place], Pruner]:
    if "seed" in variant:  # else the same row of every batch would draw the same
        first = variant["seed"] * _SEED_STEP
        return lambda place: build_spec(spec, **shared, seed=first + place.start)
    pruner = build_spec(spec, **shared, **variant)
    return lambda place: pruner


def oracle_conditions(budgets: Sequence[Budget]) -> list[Condition]:
    """Keep what lies on the objects that questions are about."""

    def maker(budget: Budget) -> Callable[[Place], Pruner]:
        return lambda place: Oracle(seen=place.seen(), **budget.settings())

    return [Condition(ORACLE, b, maker(b), {"oracle": 1, **b.settings()}, True) for b in budgets]


def untrained_conditions(
    budgets: Sequence[Budget], seeds: Sequence[int], like: Any
) -> list[Condition]:
    """Pruners of one kind with random weights, see `PrunerNetwork.untrained_configs`.

    Args:
        budgets: see `Budget`. seeds: of the weights.
        like: a network of the same sizes, whose statistics standardise.
    """
    cls = trainable.of_network(like)
    found = []
    for label, own in untrained_labels(cls, like.config).items():
        about = {"untrained": dataclasses.asdict(own)}
        for seed in seeds:
            network = type(like).untrained(own, seed, like)
            for budget in budgets:
                pruner = build_pruner(cls.name, network=network, **budget.settings())
                settings = about | budget.settings() | {"seed": seed}
                found.append(Condition(label, budget, _always(pruner), settings, True, seed))
    return found


def untrained_labels(cls: type[trainable.TrainablePruner[Any]], config: Any) -> dict[str, Any]:
    """Settings of the untrained networks by their rows' labels: `untrained`, `untrained:mine`."""
    kind = [] if cls.name == trainable.DEFAULT else [cls.name]
    labels = {}
    for difference, own in cls.network_class.untrained_configs(config).items():
        about = ",".join([*kind, *filter(None, [difference])])
        labels[f"{UNTRAINED}:{about}" if about else UNTRAINED] = own
    return labels


def _always(pruner: Pruner) -> Callable[[Place], Pruner]:
    return lambda place: pruner


def default_layer(num_blocks: int, pruner: str = trainable.DEFAULT) -> int:
    """The layer that a trainable pruner reads by default, in a tower of any depth."""
    return int(trainable.of_name(pruner).network_class.default_layer(num_blocks))


def content_hash(path: str) -> str:
    """A hash of the weights and the configuration in a folder.

    Other names, and folders whose weights are in many files, are returned as they are.
    """
    folder = Path(path)
    if not (folder / WEIGHTS_NAME).is_file():
        return path
    found = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes())
    if (folder / CONFIG_NAME).is_file():
        found.update((folder / CONFIG_NAME).read_bytes())
    return found.hexdigest()

"""What of a results.json is to be shown: the flags of `ocvtp table` and `ocvtp plot`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ocvtp.field_types import no_such

_EQUAL = 1e-4  # shares in a results.json have six digits


@dataclass(frozen=True)
class Chosen:
    """What is to be shown; nothing given is everything.

    Args:
        only: labels of pruners, or several with commas between them.
        metrics: names. num_keep, keep_ratio: budgets.
    """

    only: Sequence[str] = ()
    metrics: Sequence[str] = ()
    num_keep: Sequence[int] = ()
    keep_ratio: Sequence[float] = ()

    def labels(self, known: Iterable[str]) -> set[str]:
        """Those of the known labels.

        Raises:
            ValueError: for one that is none of them.
        """
        known = list(dict.fromkeys(known))
        return set(_named("--only", _split(self.only, known), known)) if self.only else set(known)

    def of(self, metrics: Sequence[str], first: int = 1) -> list[str]:
        """Those of the known metrics, in the order given; the `first` where none was."""
        if not self.metrics:
            return list(metrics[:first])
        return [name for name in self.metrics if name in metrics]

    def check_metrics(self, known: Iterable[str]) -> None:
        """Refuse a metric that no file has.

        Raises:
            ValueError: for the first.
        """
        _named("--metric", self.metrics, list(dict.fromkeys(known)))

    def has_budget(self, num_keep: int | None, share: float | None) -> bool:
        """Whether a budget is to be shown."""
        if not self.num_keep and not self.keep_ratio:
            return True
        close = share is not None and any(abs(share - own) < _EQUAL for own in self.keep_ratio)
        return close or num_keep in self.num_keep


def _split(words: Sequence[str], known: Collection[str]) -> list[str]:
    """The labels in words, which may have commas themselves."""
    found: list[str] = []
    for word in words:
        rest = word.split(",")
        while rest:  # the longest beginning that is a label
            counts = [n for n in range(len(rest), 0, -1) if ",".join(rest[:n]) in known]
            count = counts[0] if counts else 1
            found.append(",".join(rest[:count]))
            rest = rest[count:]
    return found


def _named(flag: str, names: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in known:
            raise ValueError(
                f"{flag} {name}: the results have none of that name{no_such(name, known)} They have"
                f" {', '.join(known)}."
            )
    return names

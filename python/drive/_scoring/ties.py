"""Scores of 0: where they decide, the order of the entries has chosen what survives, and not the method."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from drive.targets.costs import Goals

_log = logging.getLogger(__name__)
_warned = WeakTensorKeyDictionary()
_NAMED = 5  # layers in a message
REMEDIES = "Train the model first, take another method, exclude these layers, or accept it by on_ties='index'"


class Zeros(NamedTuple):
    """A tensor that a step has pruned.

    Attributes:
        alive, kept: its survivors before and after the step.
        zeros: how many scored 0.
        lowest: how many scored 0 or, where scores have signs, less.
        guarded: how many `min_keep` makes survive.
    """

    name: str
    alive: int
    zeros: int
    lowest: int
    kept: int
    guarded: int


class Competition(NamedTuple):
    """Tensors that competed with each other in a step, and the index decided among scores of 0.

    Attributes:
        prune: how many of their entries this step and all later ones prune.
    """

    tensors: list[Zeros]
    prune: int

    @property
    def whole(self) -> list[Zeros]:
        """Tensors all of which scored 0, and `min_keep` is not all that made some survive."""
        whole = [t for t in self.tensors if 0 < t.zeros == t.alive]
        return whole if any(t.kept > t.guarded for t in whole) else []

    @property
    def partial(self) -> bool:
        """Do more entries score 0 than are pruned in the end?"""
        return sum(t.lowest for t in self.tensors) > self.prune


class TieCheck(NamedTuple):
    """What to check a step for.

    Attributes:
        op: whose step it is, and which one.
        last: what the last step prunes.
        meaning: of a score of 0.
        first: is it the first step?
        raises: else all ties are accepted, and logged.
    """

    op: str
    last: Goals
    meaning: str
    first: bool
    raises: bool


def check_ties(check: TieCheck, competitions: Sequence[Competition]) -> None:
    """Raise, or log, where the order of the entries has decided instead of their scores.

    An error is where all of a tensor score 0, as in zero-initialised layers and in those that are scored
    through them, and in the first step, where more entries score 0 than all steps together prune. In the
    last step such a share may be due to one batch: a warning. Where fewer score 0 (units that are dead,
    pixels that are always black) all of them go in the end, in whichever order.
    """
    decided = [c for c in competitions if c.whole or c.partial]
    tensors = [t for c in decided or competitions for t in c.tensors]
    zeros, alive = sum(t.zeros for t in tensors), sum(t.alive for t in tensors)
    share = f"{check.op}: {zeros / max(alive, 1):.1%} of the entries score 0"
    if not decided:
        if competitions:
            _log.info("%s, no more than are pruned in the end", share)
        return
    whole = [t for t in tensors if 0 < t.zeros == t.alive]
    some = sorted((t for t in tensors if 0 < t.zeros < t.alive), key=lambda t: -t.zeros)
    names = [f"all of {t.name}" for t in whole] + [f"{t.zeros / t.alive:.1%} of {t.name}" for t in some]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    facts = by_index(f"{share} ({', '.join(names[:_NAMED])}{more})", check.meaning)
    if not check.raises or not (check.first or any(c.whole for c in decided)):
        _log.warning("%s", facts)
        return
    raise ValueError(f"{facts}. {REMEDIES}")


def by_index(share: str, meaning: str) -> str:
    """That scores of 0 have decided, in words.

    Args:
        share: how many score 0.
        meaning: of a score of 0.
    """
    return (
        f"{share}, so that not the scores but the lower index decides which of these survive; 0 means that "
        f"{meaning}"
    )


def warn_of_ties(op: str, weights: Sequence[Tensor]) -> None:
    """Log, once for these weights, that the lower index has chosen among entries of score 0."""
    if weights[0] in _warned:
        return
    _warned[weights[0]] = True
    _log.warning(
        "%s: the weakest survivors score 0 (weight or gradient is 0), so which of such entries survive the "
        "lower index has decided; train the model first, or score it otherwise", op,
    )  # fmt: skip

"""What `drive.prune` is going to do: its arguments, checked, and what they leave to be decided, decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import methods, schedules
from ._scoring.capture import Capture, check_capture
from .distributed.team import Said
from .methods.base import Method
from .targets.arguments import real, whole
from .targets.costs import alpha_of, sparsity_of
from .targets.structures import CHANNELS

DEFAULT_ALPHA = 1.0
_SEEDS = -(2**63), 2**64 - 1  # that torch.manual_seed takes
OnTies = Literal["error", "index"]
Ranks = Literal[
    "one", "copies", "shards"
]  # does this process have the model alone, or a copy or shards of it?


@dataclass(frozen=True)
class Plan:
    """A run of `drive.prune`, whose arguments the fields are unless said otherwise.

    Attributes:
        sizes: entries of the prunable tensors by name, those of this rank.
        sparsity: with `macs`, the share of the multiply-adds that goes, in which the steps are, too.
        device: of these tensors.
        schedule: its name, or that of the callable.
        steps: the sparsity after each iteration.
        zeros_decide: whether a step may have nothing but scores of 0: it is accepted, or they are not all
            among those that it compares (N:M).
        accumulate: batches that one score takes.
        capture: False also where no graph can be captured: the method trains, or there are several ranks.
    """

    method: Method
    sizes: Mapping[str, int]
    device: torch.device
    sparsity: float
    macs: float | None
    alpha: float
    schedule: str
    steps: tuple[float, ...]
    scope: str
    structure: str
    min_keep: int
    round_steps: int | None
    accumulate: int
    seed: int
    autocast: torch.dtype | None
    capture: Capture
    on_ties: OnTies

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Tensor],
        ranks: Ranks = "one",
        *,
        sparsity: float | None = None,
        macs: float | None = None,
        alpha: float | None = None,
        method: str | Method = "drive",
        iterations: int | None = None,
        schedule: str | schedules.Schedule | None = None,
        scope: str | None = None,
        structure: str = "unstructured",
        min_keep: int | None = None,
        round_steps: int | None = None,
        accumulate: int | None = None,
        seed: int = 0,
        autocast: torch.dtype | None = None,
        capture: Capture = "auto",
        on_ties: OnTies = "error",
    ) -> Plan:
        """The plan for these weights, one or more, all on one device.

        Raises:
            ValueError: an argument of `drive.prune` that is not what it says there.
        """
        for argument, given in (("structure", structure), ("scope", "" if scope is None else scope)):
            if not isinstance(given, str):
                raise TypeError(f"prune: {argument} must be a name, got {given!r:.80}")
        sparsity, macs, alpha = _goal(sparsity, macs, alpha)
        chosen = methods.get(method)
        by_outputs = structure == CHANNELS
        own = chosen.iterations_to(sparsity, by_outputs)
        count = whole("prune", "iterations", own if iterations is None else iterations, 1)
        taken = whole("prune", "accumulate", chosen.accumulate if accumulate is None else accumulate, 1)
        steps = None if round_steps is None else whole("prune", "round_steps", round_steps, 1)
        seed = whole("prune", "seed", seed, *_SEEDS, words="an integer from -2^63 to 2^64 - 1")
        if ranks != "one" and chosen.spread not in (ranks, "shards"):
            raise ValueError(f"prune: method must be one for {ranks} of a model, got {chosen.name!r}")
        if schedule is None:
            several = chosen.iterations == 1 < count  # of a one-shot method
            schedule = "exponential" if several and chosen.schedule == "one_shot" else chosen.schedule
        device = next(iter(weights.values())).device
        check_capture("prune", capture, device)
        against = {
            "a method that trains": chosen.stage == "training",
            "a model on several ranks": ranks != "one",
        }
        for what, holds in against.items():
            if holds and capture is True:
                raise ValueError(f"prune: capture must be 'auto' or False for {what}, got True")
        if scope is None:
            scope = "global" if by_outputs else chosen.scope
        if min_keep is None:
            min_keep = 1 if by_outputs else 0
        words = "an integer >= 1 for structure 'channels'" if by_outputs else None
        min_keep = whole("prune", "min_keep", min_keep, 1 if by_outputs else 0, words=words)
        if by_outputs:
            if ranks != "one":
                raise ValueError(
                    "prune: structure must be 'unstructured' for a model on several ranks, got 'channels'"
                )
            if scope == "erk":
                raise ValueError(
                    "prune: scope must be 'global' or 'uniform' for structure 'channels', got 'erk'"
                )
        if macs is not None:
            needs = {
                "scope must be 'global'": (scope, scope == "global"),
                "structure must be 'unstructured', 'channels' or 'ROWSxCOLUMNS'": (
                    structure,
                    ":" not in structure,
                ),
            }
            for what, (got, holds) in needs.items():
                if not holds:
                    raise ValueError(f"prune: {what} with macs, got {got!r}")
        if autocast not in (None, torch.bfloat16):
            # float16 would need its loss scaled
            raise ValueError(f"prune: autocast must be None or torch.bfloat16, got {autocast!r}")
        if on_ties not in ("error", "index"):
            raise ValueError(f"prune: on_ties must be 'error' or 'index', got {on_ties!r}")
        return cls(
            method=chosen,
            sizes={name: weight.numel() for name, weight in weights.items()},
            device=device,
            sparsity=sparsity,
            macs=macs,
            alpha=alpha,
            schedule=schedule if isinstance(schedule, str) else getattr(schedule, "__name__", "callable"),
            steps=tuple(schedules.plan(schedule, sparsity, count)),
            scope=scope,
            structure=structure,
            min_keep=min_keep,
            round_steps=steps,
            accumulate=taken,
            seed=seed,
            autocast=autocast,
            capture=False if any(against.values()) else capture,
            on_ties=on_ties,
        )

    @property
    def iterations(self) -> int:
        return len(self.steps)

    @property
    def by_outputs(self) -> bool:
        """Are outputs of layers pruned as a whole?"""
        return self.structure == CHANNELS

    @property
    def trains(self) -> bool:
        """Does the method train the model in the course of pruning it?"""
        return self.method.stage == "training"

    @property
    def zeros_decide(self) -> bool:
        return self.on_ties == "index" or ":" in self.structure

    @property
    def said(self) -> Said:
        """What must be the same on all ranks, beside what a selection says."""
        return [
            *(("method", self.method.name), ("sparsity", self.sparsity), ("iterations", self.iterations)),
            *(("macs", self.macs), ("alpha", self.alpha)),
            *(
                ("round_steps", self.round_steps),
                ("accumulate", self.accumulate),
                ("steps", list(self.steps)),
                ("on_ties", self.on_ties),
            ),
        ]

    def __str__(self) -> str:
        batches = f", {self.accumulate} batches a score" if self.accumulate > 1 else ""
        guard = f", at least {self.min_keep} survivors a {'group' if self.by_outputs else 'matrix'}"
        guard = guard if self.min_keep else ""
        goal = f"{self.sparsity:.2%} of" if self.macs is None else f"{self.macs:.2%} of the multiply-adds of"
        return (
            f"{self.method.name} to {goal} {sum(self.sizes.values()):,} entries in "
            f"{len(self.sizes)} tensors: {self.iterations} iterations on schedule {self.schedule}{batches}, "
            f"scope {self.scope}, structure {self.structure}{guard}"
        )


def _goal(
    sparsity: float | None, macs: float | None, alpha: float | None
) -> tuple[float, float | None, float]:
    """The share that goes, of entries or of multiply-adds; `macs` and `alpha`."""
    if (sparsity is None) == (macs is None):
        raise ValueError(f"prune: sparsity or macs must be given, got {'both' if macs else 'neither'}")
    if macs is None:
        if alpha is not None:
            raise ValueError(f"prune: alpha must be None without macs, got {alpha!r}")
        return sparsity_of("prune", sparsity), None, 0.0
    share = real(macs)
    if share is None or not 0 < share <= 1:
        raise ValueError(f"prune: macs must be a number in (0, 1], got {macs!r:.80}")
    return 1 - share, share, alpha_of("prune", DEFAULT_ALPHA if alpha is None else alpha)

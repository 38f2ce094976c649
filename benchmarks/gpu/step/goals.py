"""What was promised of a step on a GPU, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch

from benchmarks.gpu.step.providers import CHECKED, YARDSTICK
from benchmarks.gpu.step.rows import NAN, WRONG, Cases, Row, best_of_pytorch, name_of, number, ours
from benchmarks.pages import markdown
from drive.experiments.bench.workload import Case

Found = dict[str, Row]


@dataclass(frozen=True)
class Goal:
    """A figure of a first step to 90 %, and what it must be at most, or at least."""

    size: str
    dtype: torch.dtype
    figure: str
    value: Callable[[Found], float]
    at_most: float = math.inf
    at_least: float = 0

    @property
    def limit(self) -> str:
        return f"<= {self.at_most:g}" if self.at_least == 0 else f">= {self.at_least:g}"


def over_yardstick(found: Found) -> float:
    return ours(found).seconds / found[YARDSTICK].seconds


def over_rivals(found: Found) -> float:
    best = best_of_pytorch(found)
    return best.seconds / ours(found).seconds if best else NAN


DTYPES = torch.float32, torch.bfloat16
GOALS = [
    *(
        Goal(size, dtype, f"ours / {YARDSTICK}", over_yardstick, at_most=most)
        for size, dtype, most in (
            ("1B", torch.float32, 1.6),
            ("1B", torch.bfloat16, 2.0),
            ("11M", torch.float32, 2.5),
            ("11M", torch.bfloat16, 2.5),
        )
    ),
    *(
        Goal(size, dtype, "best of PyTorch / ours", over_rivals, at_least=10)
        for size, dtype in product(("138M", "1B"), DTYPES)
    ),
]
HARD = 2.0  # times as long as normally distributed scores, at most


def verdict(value: float, right: bool) -> str:
    return "not measured" if math.isnan(value) else "met" if right else "MISSED"


def lines(cases: Cases) -> list[list[str]]:
    """Goal, limit, measured, verdict."""
    checked = [found[name] for found in cases.values() for name in CHECKED if found[name].checked]
    wrong = [row for found in cases.values() for row in found.values() if row.note.startswith(WRONG)]
    share = f"{len(checked)} of {len(checked) + len(wrong)}"
    table = [["masks, in all cases", "right", share, verdict(0 if checked or wrong else NAN, not wrong)]]
    for goal in GOALS:
        found = cases.get(Case(goal.size, goal.dtype, 0.9, old_masks=False))
        value = goal.value(found) if found else NAN
        right = goal.at_least <= value <= goal.at_most
        name = f"{goal.size}, {name_of(goal.dtype)}: {goal.figure}"
        table.append([name, goal.limit, number(value, ".2f"), verdict(value, right)])
    slowdown, worst = hardest(cases)
    name = f"hard scores / normal ones{worst}"
    return [*table, [name, f"<= {HARD:g}", number(slowdown, ".2f"), verdict(slowdown, slowdown <= HARD)]]


def hardest(cases: Cases) -> tuple[float, str]:
    """How many times longer the worst of the hard scores take than normal ones, and which that is."""
    ratios = []
    for case, found in cases.items():
        normal = cases.get(replace(case, scores="normal"))
        if case.scores != "normal" and normal and not math.isnan(ratio := slower(found, normal)):
            ratios.append((ratio, f", the worst: {case.size}, {name_of(case.dtype)}, {case.scores}"))
    return max(ratios, default=(NAN, ""))


def slower(found: Found, normal: Found) -> float:
    return ours(found).seconds / ours(normal).seconds


def table(cases: Cases) -> str:
    return markdown(["goal", "limit", "measured", ""], lines(cases))

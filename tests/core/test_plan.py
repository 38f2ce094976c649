"""The plan of a run of drive.prune: what the arguments leave open, decided; what they may not be, refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from drive.plan import Plan

WEIGHTS = {"a": torch.ones(30, 40), "b": torch.ones(7)}


def test_what_the_method_decides():
    plan = Plan.of(WEIGHTS, sparsity=0.98, method="drive")
    assert plan.method.name == "drive"
    assert (plan.iterations, plan.schedule, plan.scope, plan.accumulate) == (100, "exponential", "global", 1)
    assert plan.steps[0] == 1 - 0.02**0.01 and plan.steps[-1] == 0.98
    assert plan.capture == "auto" and not plan.trains


@pytest.mark.parametrize(
    ("given", "schedule", "steps"),
    (
        ({}, "one_shot", (0.5,)),
        ({"iterations": 2}, "exponential", (1 - 0.5**0.5, 0.5)),  # of a one-shot method
        ({"iterations": 2, "schedule": "linear"}, "linear", (0.25, 0.5)),
        ({"iterations": 2, "schedule": lambda step: step / 4}, "<lambda>", (0.25, 0.5)),
    ),
)
def test_schedules(given: dict[str, Any], schedule: str, steps: tuple[float, ...]):
    plan = Plan.of(WEIGHTS, sparsity=0.5, method="snip", **given)
    assert (plan.schedule, plan.steps) == (schedule, steps)


def test_no_graph_is_captured_of_a_method_that_trains_or_on_several_ranks():
    assert Plan.of(WEIGHTS, sparsity=0.5, method="imp").capture is False
    assert Plan.of(WEIGHTS, "copies", sparsity=0.5).capture is False
    assert Plan.of(WEIGHTS, "one", sparsity=0.5).capture == "auto"


@pytest.mark.parametrize(
    ("ranks", "method"), (("copies", "grasp"), ("shards", "grasp"), ("shards", "synflow"))
)
def test_methods_that_cannot(ranks: str, method: str):
    with pytest.raises(ValueError, match=f"prune: method must be one for {ranks} of a model, got '{method}'"):
        Plan.of(WEIGHTS, ranks, sparsity=0.5, method=method)


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ({"sparsity": 1.0}, r"prune: sparsity must be in \[0, 1\), got 1.0"),
        ({"iterations": 0}, "prune: iterations must be an integer >= 1, got 0"),
        ({"accumulate": 1.5}, "prune: accumulate must be an integer >= 1, got 1.5"),
        ({"autocast": torch.float16}, "prune: autocast must be None or torch.bfloat16, got torch.float16"),
        ({"capture": "always"}, "prune: capture must be True, False or 'auto', got 'always'"),
    ),
)
def test_refuses(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Plan.of(WEIGHTS, **{"sparsity": 0.5, **given})


def test_is_fixed_and_says_what_it_is():
    plan = Plan.of(WEIGHTS, sparsity=0.9, method="crop", iterations=5, min_keep=3, structure="4x4")
    with pytest.raises(FrozenInstanceError):
        plan.sparsity = 0.5
    assert str(plan) == (
        "crop to 90.00% of 1,207 entries in 2 tensors: 5 iterations on schedule halving, 5 batches a score, "
        "scope global, structure 4x4, at least 3 survivors a matrix"
    )

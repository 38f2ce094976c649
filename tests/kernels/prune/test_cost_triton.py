"""drive::prune_to_cost_ in Triton without a GPU: interpreted, what it launches, what it refuses.
test_prune_triton.py looks at its code, and runs it on a device."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ugly import Step, sample_inputs, to_cost

pytest.importorskip("triton", reason="Triton is not installed")

from ahead_of_time import Launch, assert_passes, interpreted, recorded

from drive_kernels.prune.triton import launch as launcher


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[subprocess.Popen[str]]:
    """The tests in helpers/interpreted/prune_to_cost.py, while those of this file run."""
    with interpreted("prune_to_cost.py") as process:
        yield process


def launches(step: Step) -> set[Launch]:
    with recorded() as found:
        getattr(launcher, step.op)(*step.clone().args())
    return found


@pytest.mark.parametrize("index", range(len(sample_inputs())))
def test_costs_of_1_launch_what_prune_does(index: int):
    step = sample_inputs()[index]
    ones = [1] * len(step.weights)
    costless = to_cost(step, ones, 0.0, 0.7)
    assert launches(costless) == launches(step)
    assert launches(replace(costless, scales=[0.5] * len(ones))) != launches(step)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    (
        ({"costs": [1, 2]}, ValueError, "a number for each of 1 weights, got 2 and 1"),
        ({"costs": [0]}, ValueError, r"costs\[0\] must be from 1 to 2\^31 - 1, got 0"),
        ({"costs": [2**31]}, ValueError, r"costs\[0\] must be from 1 to 2\^31 - 1, got 2147483648"),
        ({"scales": [torch.nan]}, ValueError, r"scales\[0\] must be from 0 to 1, got nan"),
        ({"scales": [1.5]}, ValueError, r"scales\[0\] must be from 0 to 1, got 1.5"),
        ({"max_cost": -1}, ValueError, "max_cost must be >= 0, got -1"),
        ({"min_keep": -1}, ValueError, "min_keep must be >= 0, got 0, -1"),
        ({"grads": [torch.ones(3)]}, ValueError, r"grads\[0\] must have shape \[2\], got \[3\]"),
    ),
)
def test_refuses(changed: dict[str, object], error: type[Exception], message: str):
    good = {
        "weights": [torch.ones(2)], "grads": [torch.ones(2)], "mask_grads": [], "masks": [torch.ones(2) > 0],
        "fresh": True, "costs": [3], "scales": [1.0], "max_cost": 5, "min_keep": 0,
    }  # fmt: skip
    with pytest.raises(error, match=f"drive::prune_to_cost_: .*{message}"):
        launcher.prune_to_cost_(**{**good, **changed})


def test_refuses_costs_beyond_int64():
    weight, mask = torch.ones(1).expand(2**32 + 3), torch.ones(1, dtype=torch.bool).expand(2**32 + 3)
    with pytest.raises(ValueError, match=r"all entries must cost less than 2\^63 together, got 92233720"):
        launcher.prune_to_cost_([weight], [weight], [], [mask], True, [2**31 - 1], [1.0], 5, 0)


def test_in_the_interpreter(interpreter: subprocess.Popen[str]):
    """Against the reference: helpers/interpreted/prune_to_cost.py."""
    assert_passes(interpreter)

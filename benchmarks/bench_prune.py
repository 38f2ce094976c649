"""One pruning step to 90 % against its rivals."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sizes import Size
from drive.experiments.bench import step as bench
from drive.experiments.bench.workload import Case, Inputs, validate

CASE = Case("any size", torch.float32, 0.9, old_masks=False)


@pytest.fixture(scope="module")
def inputs(size: Size, device: str) -> Inputs:
    made = Inputs(size.shapes, CASE.dtype, device)
    validate(made, CASE, torch.ops.drive.prune_)
    return made


@pytest.mark.parametrize("provider", bench.PROVIDERS)
def test_step(timed, inputs: Inputs, provider: str):
    def prepare() -> bench.Step:
        inputs.fresh()
        return bench.PROVIDERS[provider](inputs, CASE)

    group = f"One step to 90 % over {inputs.entries:,} weights"
    timed(group, prepare, rounds=3 if provider in bench.RIVALS else 20, entries=inputs.entries)

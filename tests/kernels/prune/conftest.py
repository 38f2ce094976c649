"""What the tests on a CUDA device share."""

from __future__ import annotations

import pytest
from on_device import implementation

from drive.fused import PruneOp, PruneOps


@pytest.fixture(params=("compiled", "triton"))
def prune_(request: pytest.FixtureRequest) -> PruneOp:
    return implementation(request.param)


@pytest.fixture(params=("compiled", "triton"))
def ops(request: pytest.FixtureRequest) -> PruneOps:
    return PruneOps(implementation(request.param), implementation(request.param, "prune_to_cost_"))

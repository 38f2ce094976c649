"""What the tests on a CUDA device share."""

from __future__ import annotations

import pytest
from on_device import implementation

from drive.fused import PruneOp


@pytest.fixture(params=("compiled", "triton"))
def prune_(request: pytest.FixtureRequest) -> PruneOp:
    return implementation(request.param)

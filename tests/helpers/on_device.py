"""Pruning steps on a CUDA device: their implementations, and whether one does what the CPU does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from ugly import Step, memory

from drive.experiments.bench import workload
from drive.fused import PruneOp
from drive_kernels.prune.cost import reference as cost_reference
from drive_kernels.prune.op import reference

DEVICE = "cuda"
ORACLES = (torch.ops.drive.prune_, reference)
COST_ORACLES = (torch.ops.drive.prune_to_cost_, cost_reference)


def implementation(name: str, op: str = "prune_") -> PruneOp:
    try:
        return workload.implementation(name, op=op)
    except ImportError as error:
        pytest.skip(str(error))


def assert_parity(prune_: PruneOp, step: Step, oracles: Sequence[PruneOp] = ORACLES) -> None:
    on_device = step.to(DEVICE)
    outputs = [output.cpu() for output in prune_(*on_device.args())]
    for oracle in oracles:
        on_cpu = step.to("cpu")
        kept, nonfinite, scores = oracle(*on_cpu.args())
        for name in ("weights", "grads", "mask_grads", "masks"):
            for index, pair in enumerate(zip(getattr(on_device, name), getattr(on_cpu, name), strict=True)):
                assert torch.equal(*map(memory, pair)), f"{name}[{index}]"
        assert torch.equal(outputs[0], kept)
        assert torch.equal(outputs[1], nonfinite)
        # float64 sums in another order
        torch.testing.assert_close(outputs[2], scores, rtol=1e-12, atol=0, equal_nan=True)

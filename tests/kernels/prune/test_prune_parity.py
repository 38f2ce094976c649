"""Pruning steps on a CUDA device, compiled and in Triton, against the CPU: the same bits for any input."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from misleading import TRAPS, misleading
from on_device import COST_ORACLES, DEVICE, ORACLES, assert_parity, implementation
from torch import Tensor
from ugly import (
    LAYOUTS,
    NARROW,
    CostStep,
    Step,
    cost_steps,
    laid_out,
    sample_inputs,
    steps,
    to_cost,
    valued,
)

from drive.experiments.bench.workload import SCORES, Case, Inputs
from drive.fused import PruneOp, PruneOps

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("index", range(len(sample_inputs())))
def test_parity_on_sample_inputs(prune_: PruneOp, index: int):
    assert_parity(prune_, sample_inputs()[index])


@settings(
    max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate], print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(step=steps(), poison=st.sampled_from([None] * 9 + [torch.nan, -torch.inf]), at=st.integers(0, 2**20))
def test_parity_on_200_random_steps(prune_: PruneOp, step: Step, poison: float | None, at: int):
    weight = step.weights[at % len(step.weights)]
    if poison is not None and weight.numel():
        weight[tuple(at % size for size in weight.shape)] = poison
    assert_parity(prune_, step)


@settings(
    max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate], print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(step=cost_steps())
def test_parity_on_200_random_budgets(ops: PruneOps, step: CostStep):
    assert_parity(ops.to_cost, step, COST_ORACLES)


@pytest.mark.parametrize("values", ("normal", "ties", "equal"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_parity_to_cost_on_many_chunks(ops: PruneOps, dtype: torch.dtype, values: str):
    """Cheap entries by the million beside costly ones, in lists, at edges and through all entries."""
    generator = torch.Generator().manual_seed(7)
    shapes = ([64, 3, 3, 3], [300, 256, 3, 3], *([[64]] * 100), [2_000_003], [7])
    weights, grads = (
        [laid_out(valued(s, dtype, values, generator), "channels_last") for s in shapes] for _ in range(2)
    )
    masks = [torch.rand(s, generator=generator) < 0.9 for s in shapes]
    costs = [50176, 3136, *range(1, 101), 1, 2**30]
    for alpha, share, fresh, min_keep in ((0.0, 0.1, True, 0), (0.5, 0.5, False, 0), (0.5, 0.6, True, 50)):
        step = Step(weights, grads, [], masks, fresh, 0, min_keep)
        assert_parity(ops.to_cost, to_cost(step, costs, alpha, share), COST_ORACLES[:1])


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("values", ("normal", "ties", "equal", "half zero"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_parity_on_many_chunks(prune_: PruneOp, dtype: torch.dtype, values: str, layout: str):
    """Over 2^20 entries in some hundred tensors, with ties that end in the middle of one."""
    generator = torch.Generator().manual_seed(1)
    shapes = ([300, 256, 3, 3], [100_003], [7], *([[64]] * 100), [160, 256, 3, 3])
    weights = [laid_out(valued(s, dtype, values, generator), layout) for s in shapes]
    grads = [laid_out(valued(s, dtype, values, generator), layout) for s in shapes]
    masks = [torch.rand(s, generator=generator) < 0.9 for s in shapes]
    total = sum(w.numel() for w in weights)
    for fraction, fresh, min_keep in ((0.001, True, 0), (0.5, False, 0), (0.95, True, 5), (0.99, False, 5)):
        step = Step(weights, grads, [], masks, fresh, round(fraction * total), min_keep)
        assert_parity(prune_, step, ORACLES[:1])


@pytest.mark.parametrize("offsets", ((1, 1, 1), (0, 1, 0), (3, 0, 5), (4, 4, 4)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_parity_unaligned(prune_: PruneOp, dtype: torch.dtype, offsets: tuple[int, int, int]):
    """Views that begin some entries into their memory: no loads of 16 bytes, or not for all operands."""
    generator = torch.Generator().manual_seed(2)
    n = 70_001
    weight, grad = (valued([n + 8], dtype, "normal", generator) for _ in range(2))
    mask = torch.rand(n + 8, generator=generator) < 0.9
    operands = [[t[o : o + n]] for t, o in zip((weight, grad, mask), offsets, strict=True)]
    for fresh in (True, False):
        assert_parity(prune_, Step(operands[0], operands[1], [], operands[2], fresh, n // 2, 0))


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """A copy with the same strides that begins some entries later in its memory."""
    entries = tensor.untyped_storage().nbytes() // tensor.element_size()
    room = torch.zeros(entries + offset, dtype=tensor.dtype)
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() + offset).copy_(tensor)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_parity_of_mixed_layouts(prune_: PruneOp, dtype: torch.dtype):
    """A tensor for every choice of layouts of weight, gradient and mask, which begin anywhere."""
    generator = torch.Generator().manual_seed(4)
    lists: list[list[Tensor]] = [[], [], []]
    for index, layouts in enumerate(product(LAYOUTS, repeat=3)):
        shape = [24, 17, 3, 3]
        weight, grad = (valued(shape, dtype, "normal", generator) for _ in range(2))
        mask = torch.rand(shape, generator=generator) < 0.9
        for into, tensor, layout, step in zip(lists, (weight, grad, mask), layouts, (1, 3, 5), strict=True):
            into.append(shifted(laid_out(tensor, layout), index * step % 9))
    total = sum(w.numel() for w in lists[0])
    for fresh, min_keep in ((True, 0), (False, 0), (False, 7)):
        assert_parity(prune_, Step(lists[0], lists[1], [], lists[2], fresh, total * 9 // 10, min_keep))


@pytest.mark.parametrize("values", ("normal", "ties"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_parity_where_min_keep_decides(prune_: PruneOp, dtype: torch.dtype, values: str):
    """Tensors that would lose nearly everything keep their best entries; the others pay."""
    generator = torch.Generator().manual_seed(5)
    shapes = ([400, 300, 3, 3], [90_001], [3000], [50], [7])
    weights = [laid_out(valued(s, dtype, values, generator), "channels_last") for s in shapes]
    grads = [valued(s, dtype, values, generator) for s in shapes]
    for weight in weights[1:4]:
        weight.mul_(1e-3)
    masks = [torch.rand(s, generator=generator) < 0.9 for s in shapes]
    prune = round(0.95 * sum(w.numel() for w in weights))
    for fresh, min_keep in ((True, 60), (False, 2000)):
        step = Step(weights, grads, [], masks, fresh, prune, min_keep)
        kept = torch.ops.drive.prune_(*replace(step, min_keep=0).to("cpu").args())[0]
        assert (kept[1:3] < min_keep).all(), "it decides nothing"
        assert_parity(prune_, step, ORACLES[:1])


@pytest.mark.parametrize("min_keep", (0, 3))
def test_parity_of_a_thousand_small_tensors(prune_: PruneOp, min_keep: int):
    """As a network of many small layers has them, empty ones among them."""
    generator = torch.Generator().manual_seed(6)
    sizes = torch.randint(400, (1000,), generator=generator).tolist()
    weights, grads = (
        [valued([n], NARROW[i % 3], "normal", generator) for i, n in enumerate(sizes)] for _ in range(2)
    )
    masks = [torch.rand(n, generator=generator) < 0.7 for n in sizes]
    for fresh in (True, False):
        step = Step(weights, grads, [], masks, fresh, round(0.95 * sum(sizes)), min_keep)
        assert_parity(prune_, step, ORACLES[:1])


@pytest.mark.parametrize(("n", "samples"), ((1_000_003, 1 << 14), (4_000_037, 1 << 17)))
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_parity_with_misleading_sample(prune_: PruneOp, dtype: torch.dtype, trap: str, n: int, samples: int):
    for step in misleading(trap, n, samples, dtype):
        assert_parity(prune_, step, ORACLES[:1])


@pytest.mark.parametrize("old_masks", (False, True))
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_parity_of_compiled_and_triton(dtype: torch.dtype, scores: str, old_masks: bool):
    compiled, triton = implementation("compiled"), implementation("triton")
    inputs = Inputs([(30, 1000, 1000), (512, 512, 3, 3), (10, 512)], dtype, DEVICE, scores)
    for sparsity in (0.5, 0.9, 0.993):
        case = Case("32M", dtype, sparsity, old_masks, scores)
        inputs.begin(case)
        inputs.run(compiled, case)
        mask, weight = inputs.mask.clone(), inputs.weight.clone()
        inputs.run(triton, case)
        assert torch.equal(mask, inputs.mask) and torch.equal(weight, inputs.weight)

"""drive::prune_to_cost_ against a literal oracle: sort by score, walk down, add up costs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import drive_kernels  # noqa: F401  (defines torch.ops.drive)
from drive_kernels.prune.cost import reference

compiled = torch.ops.drive.prune_to_cost_.default
DTYPES = ([torch.float32], [torch.bfloat16], [torch.float64], [torch.float32, torch.float16])
KINDS = ("normal", "round", "equal", "half zero")


class Inputs:
    """Random operands, costs from 1 to 2^30, a budget."""

    def __init__(self, seed: int, large: bool = False):
        chance, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.three = chance.random() < 0.2
        self.alone = not self.three and chance.random() < 0.1
        self.fresh = chance.random() < 0.5
        kind, dtypes = chance.choice(KINDS), chance.choice(DTYPES)
        self.operands: list[list[Tensor]] = [[], [], []]
        self.masks: list[Tensor] = []
        for _ in range(chance.choice((1, 2, 3, 6))):
            small = [(chance.randint(0, 80),), (chance.randint(1, 90), chance.randint(1, 90))]
            wide = [(chance.randint(5000, 60000),), (128, chance.randint(10, 64), 3, 3)]
            shape = chance.choice([*small, (chance.randint(1, 20), 5, 3, 3)] if not large else wide)
            last = len(shape) == 4 and chance.random() < 0.5
            dtype = chance.choice(dtypes)
            for i, some in enumerate(self.operands):
                some.append(self.laid_out(self.values(shape, kind, i).to(dtype), last))
            self.masks.append(self.laid_out(torch.rand(shape, generator=self.generator) < 0.7, last))
        most = chance.choice((1, 4, 1000, 2**30))
        self.costs = [chance.randint(1, most) for _ in self.masks]
        alpha = chance.choice((0.0, 0.5, 1.0, 1.5))
        self.scales = [cost ** (-alpha / 2) for cost in self.costs]
        sizes = [mask.numel() for mask in self.masks]
        total = sum(cost * size for cost, size in zip(self.costs, sizes, strict=True))
        self.max_cost = chance.choice((0, total, total // 10, int(total * chance.random()), most // 2))
        self.min_keep = chance.choice((0, 0, 1, 20))
        if sum(min(self.min_keep, n) * c for n, c in zip(sizes, self.costs, strict=True)) > self.max_cost:
            self.min_keep = 0

    def values(self, shape: tuple[int, ...], kind: str, operand: int) -> Tensor:
        found = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if kind == "round":
            found = (found * 2).round()
        if kind == "equal":
            found = torch.ones_like(found)
        if kind == "half zero" and operand == 1:
            found[torch.rand(shape, generator=self.generator) < 0.5] = 0
        return found

    @staticmethod
    def laid_out(tensor: Tensor, last: bool) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if last else tensor

    def copies(self) -> tuple:
        """Arguments of the op, of which weights and masks are new."""
        weights, grads, mask_grads = self.operands
        return (
            [weight.clone() for weight in weights],
            [] if self.alone else grads,
            mask_grads if self.three else [],
            [mask.clone() for mask in self.masks],
            self.fresh,
            self.costs,
            self.scales,
            self.max_cost,
            self.min_keep,
        )

    def spent(self, masks: list[Tensor]) -> int:
        return sum(int(mask.sum()) * cost for mask, cost in zip(masks, self.costs, strict=True))


def literal(inputs: Inputs) -> list[Tensor]:
    """The rule in a loop over entries, for few of them."""
    weights, grads, mask_grads = inputs.operands
    wide = inputs.three or any(weight.dtype == torch.float64 for weight in weights)
    dtype = torch.float64 if wide else torch.float32
    ranked, keep, left = [], [], inputs.max_cost
    for t, (weight, scale) in enumerate(zip(weights, inputs.scales, strict=True)):
        factor = torch.tensor(scale, dtype=torch.float32).to(dtype)
        theta, grad = weight.to(dtype).flatten(), grads[t].to(dtype).flatten()
        if inputs.three:
            score = theta * mask_grads[t].to(dtype).flatten() * grad * factor
        else:
            score = theta * factor if inputs.alone else theta * (grad * factor)
        alive = torch.ones_like(score, dtype=torch.bool) if inputs.fresh else inputs.masks[t].flatten()
        own = [(-float(s), t, i) for i, s in enumerate(score.abs()) if alive[i]]
        keep.append(torch.zeros_like(alive))
        for _, _, i in sorted(own)[: inputs.min_keep]:
            keep[t][i] = True
            left -= inputs.costs[t]
        ranked += [entry for entry in own if not keep[t][entry[2]]]
    for _, t, i in sorted(ranked):
        if inputs.costs[t] > left:
            break
        keep[t][i] = True
        left -= inputs.costs[t]
    return [kept.view(mask.shape) for kept, mask in zip(keep, inputs.masks, strict=True)]


@pytest.mark.parametrize("op", (compiled, reference), ids=("op", "reference"))
@pytest.mark.parametrize("seed", range(25))
def test_is_the_rule(op: Callable, seed: int):
    inputs = Inputs(seed)
    arguments = inputs.copies()
    kept, nonfinite, _ = op(*arguments)
    expected = literal(inputs)
    assert all(map(torch.equal, arguments[3], expected))
    assert kept.tolist() == [int(mask.sum()) for mask in expected] and not nonfinite.any()
    for weight, start, mask in zip(arguments[0], inputs.operands[0], expected, strict=True):
        assert torch.equal(weight, start.masked_fill(~mask, 0))
    assert inputs.spent(expected) <= inputs.max_cost


@pytest.mark.parametrize("threads", (1, 2))
@pytest.mark.parametrize("seed", range(30))
def test_is_the_reference(threads: int, seed: int):
    inputs = Inputs(1000 + seed, large=True)
    ours, theirs = inputs.copies(), inputs.copies()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = compiled(*ours)
    finally:
        torch.set_num_threads(before)
    expected = reference(*theirs)
    assert all(map(torch.equal, [*ours[0], *ours[3]], [*theirs[0], *theirs[3]]))
    assert all(map(torch.equal, found[:2], expected[:2]))
    torch.testing.assert_close(found[2], expected[2], rtol=1e-12, atol=0)


def test_costs_of_1_are_counts():
    for seed in range(20):
        inputs = Inputs(2000 + seed, large=seed % 2 == 0)
        weights, grads, mask_grads, masks, fresh, _, _, _, min_keep = inputs.copies()
        entries, ones = sum(mask.numel() for mask in masks), [1] * len(masks)
        keep = max(entries // 7, sum(min(min_keep, mask.numel()) for mask in masks))
        torch.ops.drive.prune_(weights, grads, mask_grads, masks, fresh, entries - keep, min_keep)
        again = inputs.copies()
        compiled(*again[:5], ones, [1.0] * len(ones), keep, min_keep)
        assert all(map(torch.equal, [*weights, *masks], [*again[0], *again[3]]))


def test_a_score_that_is_not_finite_changes_nothing():
    weight, grad, mask = torch.ones(100), torch.ones(100), torch.zeros(100, dtype=torch.bool)
    grad[7] = torch.nan
    kept, nonfinite, scores = compiled([weight], [grad], [], [mask], True, [3], [1.0], 30, 0)
    assert weight.eq(1).all() and mask.all() and kept.tolist() == [100] and nonfinite.tolist() == [1]
    assert scores.isnan().all()


@pytest.mark.parametrize(
    ("costs", "scales", "max_cost", "words"),
    [
        ([1, 2], [1.0], 5, "costs and scales must have a number for each of 1 weights, got 2 and 1"),
        ([0], [1.0], 5, "costs[0] must be from 1 to 2^31 - 1, got 0"),
        ([2**31], [1.0], 5, "costs[0] must be from 1 to 2^31 - 1, got 2147483648"),
        ([1], [float("nan")], 5, "scales[0] must be from 0 to 1, got nan"),
        ([1], [1.0], -1, "max_cost must be >= 0, got -1"),
    ],
)
def test_refuses(costs: list[int], scales: list[float], max_cost: int, words: str):
    weight, mask = torch.ones(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="drive::prune_to_cost_: ") as error:
        compiled([weight], [weight.clone()], [], [mask], True, costs, scales, max_cost, 0)
    assert words in str(error.value)
    assert weight.eq(1).all() and mask.all()


@pytest.mark.parametrize("op", (compiled, reference), ids=("op", "reference"))
def test_refuses_costs_beyond_int64(op: Callable):
    weight, mask = torch.ones(1).expand(2**32 + 3), torch.ones(1, dtype=torch.bool).expand(2**32 + 3)
    with pytest.raises(
        ValueError, match=r"drive::prune_to_cost_: all entries must cost less than 2\^63 together"
    ):
        op([weight], [weight], [], [mask], True, [2**31 - 1], [1.0], 5, 0)


def test_opcheck():
    for seed in range(3):
        torch.library.opcheck(compiled, Inputs(seed).copies())

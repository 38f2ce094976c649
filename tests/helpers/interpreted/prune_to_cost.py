"""drive::prune_to_cost_ in Triton in the interpreter, on CPU tensors, against the reference:
test_cost_triton.py runs these tests in a process of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prune import BF16, F16, F32, F64, PLAIN, SHAPES, some_equal
from same import PLACES, SMALL, TUNINGS, assert_same
from ugly import CostStep, Step, cost_steps, laid_out, sample_inputs, step_of, to_cost

from drive_kernels.prune.triton.host import Tuning

HUGE = 2**31 - 1


@settings(
    max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate], print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    step=cost_steps().filter(lambda step: sum(w.numel() for w in step.weights) < 6000),
    tuning=st.sampled_from(sorted(TUNINGS)),
    poison=st.sampled_from([None] * 9 + [torch.nan, -torch.inf]),
    at=st.integers(0, 2**20),
)
def test_equals_reference(step: CostStep, tuning: str, poison: float | None, at: int):
    weight = step.weights[at % len(step.weights)]
    if poison is not None and weight.numel():
        weight[tuple(at % size for size in weight.shape)] = poison
    assert_same(step, TUNINGS[tuning])


@pytest.mark.parametrize("index", range(len(sample_inputs())))
def test_real_sizes(index: int):
    step = sample_inputs()[index]
    assert_same(to_cost(step, [3, 1000, 70][: len(step.weights)], 0.5, 0.4), Tuning())


def with_budget(step: Step, costs: list[int], scales: list[float], budget: int) -> CostStep:
    return CostStep(**vars(step), costs=costs, scales=scales, max_cost=budget)


def with_share(step: Step, costs: list[int], scales: list[float], share: float) -> CostStep:
    """Of what all entries cost."""
    total = sum(cost * weight.numel() for cost, weight in zip(costs, step.weights, strict=True))
    return with_budget(step, costs, scales, int(share * total))


@pytest.mark.parametrize("min_keep", (0, 2))
def test_every_budget(min_keep: int):
    """Of equal entries in three tensors: it ends in any of them, and leaves any rest."""
    step = step_of([[4], [3], [2, 3]], "equal", min_keep=min_keep)
    for budget in range(min_keep, 4 * 3 + 3 * 5 + 6 * 2 + 1, 2 + min_keep):
        assert_same(with_budget(step, [3, 5, 2], [1.0, 1.0, 1.0], budget))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "transposed", "sliced"))
@pytest.mark.parametrize("values", ("equal", "half zero"))
def test_ties_end_anywhere(values: str, layout: str):
    """In the order of the indices, whatever the order of the memory."""
    step = step_of(SHAPES, values, layout)
    for costs, share in (([7, 100, 3, 1, 5], 0.1), ([7, 100, 3, 1, 5], 0.95), ([1, 2, HUGE, 9, 4], 0.48)):
        assert_same(with_share(step, costs, [1.0] * 5, share))


@pytest.mark.parametrize("rest", (-1, 0, 99, 100))
def test_ties_end_between_tensors(rest: int):
    """The next entry costs more than is left, or just that."""
    step = step_of(SHAPES, "equal")
    assert_same(with_budget(step, [7, 100, 3, 1, 5], [1.0] * 5, 7 * step.weights[0].numel() + rest))


def test_none_of_the_ties_survives_wherever_the_threshold_lies():
    """A budget that ends with half an entry, for distinct scores, and where the largest of two or three sizes
    fill it: with few between, the next larger key is the bracket's upper edge."""
    places, generator = set(), torch.Generator().manual_seed(8)
    for tuning in TUNINGS.values():
        for strong in (600, 900, 1100):
            distinct = step_of([[1500], [30, 40]], "normal")
            two = step_of([[1500], [30, 40]], "equal")
            two.weights[0][torch.randperm(1500, generator=generator)[:strong]] *= 2
            three = two.clone()
            three.weights[1][0] *= 1.5
            for step in (distinct, two, three):
                places.add(assert_same(with_budget(step, [10, 10], [1.0, 1.0], strong * 10 + 5), tuning))
    assert places == set(PLACES.values())


@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64))
@pytest.mark.parametrize("operands", (1, 2, 3))
def test_scores_are_rounded_as_the_reference_rounds_them(dtype: torch.dtype, operands: int):
    step = step_of(
        [[900], [30, 40], [16, 5, 3, 3]], "normal", "channels_last", dtype=dtype, three=operands == 3
    )
    step = step if operands > 1 else replace(step, grads=[])
    for scales, fresh in (([1 / 3, 0.7, 1.0], True), ([1e-40, 0.0, 1e-39], False)):
        assert_same(with_share(replace(step, fresh=fresh), [3, 1, 2], scales, 0.4))


@pytest.mark.parametrize("fresh", (True, False))
@pytest.mark.parametrize("min_keep", (0, 300))
@pytest.mark.parametrize(
    ("dtypes", "three"), (((F32, BF16, F16), False), ((F16, F64, BF16), False), ((F32, BF16, F16), True))
)
def test_by_bits(dtypes: tuple[torch.dtype, ...], three: bool, min_keep: int, fresh: bool):
    """Without gradients and old masks, as prune.py has it."""
    step = some_equal(dtypes, three=three, min_keep=min_keep, fresh=fresh)
    cost = with_share(step, [5, 1, 3], [0.5, 1.0, 0.25], 0.4)
    assert assert_same(cost, by="apply_bits") == "inside"


def test_by_keys_where_the_bits_do_not_decide():
    step = step_of(PLAIN, "normal", fresh=False)
    cost = with_share(step, [2, 3, 5], [1.0, 0.5, 0.7], 0.5)
    assert assert_same(cost, TUNINGS["list too short"], by="apply_keys") == "anywhere"


@pytest.mark.parametrize(("layout", "three"), (("channels_last", False), ("sliced", True)))
def test_min_keep(layout: str, three: bool):
    """Guards count, at what they cost: also if that is all there is, or more."""
    for values, fresh, min_keep, share in (
        ("normal", True, 3, 0.7),
        ("ties", False, 40, 0.7),
        ("equal", True, 250, 0),
    ):
        step = step_of(SHAPES, values, layout, fresh=fresh, min_keep=min_keep, three=three)
        step.weights[1] *= 1e-3  # falls below its guard
        assert_same(with_share(step, [4, 9, 1000, 1, 2], [0.5, 1 / 3, 1.0, 1.0, 0.7], share))


def test_sample_is_by_cost():
    """Few entries that cost nearly all: among all entries alike, the bracket would be far off."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(n, generator=generator) * size for n, size in ((4500, 1.0), (500, 0.1))]
    masks = [torch.ones(w.shape, dtype=torch.bool) for w in weights]
    step = Step(weights, [torch.ones_like(w) for w in weights], [], masks, True, 0, 0)
    for share in (0.2, 0.5, 0.8):
        assert assert_same(with_share(step, [1, 1000], [1.0, 1.0], share), SMALL) == "inside"


def test_sample_leaves_out_what_guards_keep():
    """The first of the equal entries only: with all of them as with none, the bracket would be far off."""
    step = step_of([[3000], [1000]], "normal", min_keep=600)
    step.weights[0][:700], step.grads[0][:700] = 10, 10
    cost = with_share(step, [7, 3], [1.0, 1.0], 0.6)
    assert assert_same(cost, SMALL._replace(sigmas=2.0)) == "inside"


def test_many_keys_of_a_chunk_are_listed():
    """More than are looked at together, of chunks that are not plain, too."""
    tuning = SMALL._replace(sigmas=30.0)
    step = step_of([[2000], [40, 33]], "normal", "sliced", fresh=False)
    for layout in ("contiguous", "sliced"):
        step = replace(step, weights=[laid_out(weight, layout) for weight in step.weights])
        assert assert_same(with_share(step, [HUGE, 12345], [0.1, 0.9], 0.5), tuning) == "inside"

"""drive::shard_*: the compiled kernels against their references, on ugly inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from ugly import Step, sample_inputs, steps

from drive_kernels.prune import shards
from drive_kernels.prune.shards import COUNTS, Operands, top_key

OPS = torch.ops.drive
INSIDE = COUNTS.index("inside")


def operands(step: Step) -> Operands:
    wide = bool(step.mask_grads) or any(w.dtype == torch.float64 for w in step.weights)
    return Operands(step.weights, step.grads, step.mask_grads, step.masks, step.fresh, wide)


def keys(some: Operands) -> Tensor:
    """Of all entries, sorted."""
    found = [piece.keys for i in range(len(some.weights)) for piece in shards._pieces(some, i)]
    return torch.cat([torch.zeros(1, dtype=torch.int64), *found]).sort().values


def check_ops(ops: Any, step: Step, data: st.DataObject) -> None:
    """Each of these ops against its reference."""
    some = operands(step)
    ranked = keys(some)
    entries = [0, *torch.tensor([w.numel() for w in step.weights]).cumsum(0).tolist()]
    drawn = st.integers(0, len(ranked) - 1).map(lambda i: int(ranked[i]) or 1)
    low, threshold, high = sorted(data.draw(drawn) for _ in range(3))
    low = data.draw(st.sampled_from((0, low, low - 1)))
    high = data.draw(st.sampled_from((max(high, low + 1), high + 1, top_key(some.wide))))
    which = data.draw(st.lists(st.integers(0, len(step.weights) - 1), max_size=4, unique=True))

    counts, total, listed = ops.shard_survey(*some, low, high, len(ranked))
    expected = shards.survey_reference(*some, low, high, len(ranked))
    assert torch.equal(counts, expected[0])
    torch.testing.assert_close(total, expected[1], rtol=1e-12, atol=0, equal_nan=True)

    shift, thresholds = data.draw(st.integers(0, 60 if some.wide else 28)), [data.draw(drawn) for _ in which]
    for here, theirs in ((None, None), (listed, expected[2])):
        bottom = max(low, 1)
        found = ops.shard_histogram(*some, here, which, bottom, shift, 100)
        assert torch.equal(found, shards.histogram_reference(*some, theirs, which, bottom, shift, 100))
        found = ops.shard_split(*some, here, which, thresholds)
        assert torch.equal(found, shards.split_reference(*some, theirs, which, thresholds))
        for t in which:
            places = st.lists(st.integers(0, step.weights[t].numel()), min_size=2, max_size=9).map(sorted)
            ends = torch.tensor(data.draw(places))
            if here is None or low < threshold < high:
                found = ops.shard_ties(*some, here, [t], threshold, ends)
                assert torch.equal(found, shards.ties_reference(*some, theirs, [t], threshold, ends))

    # tensor by tensor; and as a step cuts them: one threshold, and its first ties
    tie_ends = [data.draw(st.integers(0, w.numel())) for w in step.weights]
    thresholds = [data.draw(drawn) for _ in step.weights]
    check_apply(ops, step, None, thresholds, tie_ends)
    if low < threshold < high:
        last = data.draw(st.integers(0, entries[-1]))
        begins = zip(entries, step.weights, strict=False)
        first = [max(0, min(last - begin, w.numel())) for begin, w in begins]
        for ends in (tie_ends, first):
            check_apply(ops, step, (low, high), [threshold] * len(ends), ends)


def check_apply(
    ops: Any, step: Step, bracket: tuple[int, int] | None, thresholds: list[int], tie_ends: list[int]
) -> None:
    """After a survey with a bracket, or without one."""
    ours, theirs = step.clone(), step.clone()
    entries = sum(w.numel() for w in step.weights)
    listed = bracket and ops.shard_survey(*operands(ours), *bracket, entries)[2]
    ops.shard_apply_(*operands(ours), listed, thresholds, tie_ends)
    shards.apply_reference(*operands(theirs), None, thresholds, tie_ends)
    for mine, other in zip(ours.masks + ours.weights, theirs.masks + theirs.weights, strict=True):
        assert torch.equal(bits(mine), bits(other))


@settings(max_examples=150, deadline=None)
@given(steps(), st.data())
def test_equal_references(step: Step, data: st.DataObject):
    check_ops(OPS, step, data)


def check_many_tensors(ops: Any) -> None:
    """More than there are warps, of which every second counts: a warp looks at several."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(60, (500,), generator=generator).tolist()
    weights = [torch.randint(1, 9, (n,), generator=generator).float() for n in sizes]
    some = Operands(weights, [], [], [], True, False)
    below, two, five, eight = (int(torch.tensor(x).view(torch.int32)) + 1 for x in (0.5, 2.0, 5.0, 8.0))
    which, thresholds = list(range(0, 500, 2)), [(two, five)[t % 4 // 2] for t in range(0, 500, 2)]
    counts, _, listed = ops.shard_survey(*some, below, eight, 40_000)
    expected, _, theirs = shards.survey_reference(*some, below, eight, 40_000)
    assert torch.equal(counts, expected)
    for found, other in ((None, None), (listed, theirs)):
        split = ops.shard_split(*some, found, which, thresholds)
        assert torch.equal(split, shards.split_reference(*some, other, which, thresholds))
        histogram = ops.shard_histogram(*some, found, which, below, 22, 64)
        assert torch.equal(histogram, shards.histogram_reference(*some, other, which, below, 22, 64))


def test_many_tensors():
    check_many_tensors(OPS)


def check_no_room(ops: Any) -> None:
    """What finds no room is not listed, and nothing is written beside it."""
    step = Step([torch.arange(1.0, 200_001.0)], [], [], [torch.ones(200_000, dtype=torch.bool)], True, 0, 0)
    some = operands(step)
    ranked = keys(some)
    for room in (0, 10, 70_000):
        counts, _, listed = ops.shard_survey(*some, int(ranked[100]), int(ranked[-100]), room)
        assert counts[INSIDE] == 199_800
        found = ops.shard_histogram(*some, listed, [0], int(ranked[100]), 20, 2048)
        assert found.sum() <= room
        assert ops.shard_split(*some, listed, [0], [int(ranked[1000])]).sum() <= room


def test_no_room():
    check_no_room(OPS)


def bits(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


def check_sample(ops: Any, step: Step, count: int) -> None:
    """One score of each part, and 0 for what is pruned."""
    some = operands(step)
    count = min(count, sum(w.numel() for w in step.weights))
    sample = ops.shard_sample(*some, count)
    assert sample.shape == (count,) and sample.dtype == (torch.float64 if some.wide else torch.float32)
    found = sample.view(torch.int64 if some.wide else torch.int32).long() + 1
    assert torch.isin(found, keys(some).clamp(min=1)).all()


@settings(max_examples=50, deadline=None)
@given(steps(), st.integers(0, 5000))
def test_samples_are_entries(step: Step, count: int):
    check_sample(OPS, step, count)


def test_samples_are_spread():
    """One entry out of each equal part."""
    weights = [torch.arange(1.0, 30_001.0), torch.arange(30_001.0, 40_001.0)]
    sample = OPS.shard_sample(weights, [], [], [], True, False, 1000)
    assert ((sample - 1) // 40).long().sort().values.tolist() == list(range(1000))


CHECKSUM_DTYPES = (torch.bool, torch.bfloat16, torch.float32, torch.float64)


def check_checksum(ops: Any, dtype: torch.dtype) -> None:
    tensor = torch.randn(703, 301).round().to(dtype)
    swapped = tensor.flatten().clone()
    other = int((swapped != swapped[0]).nonzero()[0])
    swapped[[0, other]] = swapped[[other, 0]]
    tensors = [tensor, tensor.t().contiguous().t(), swapped, tensor.flatten()[1:], tensor[:0], tensor[0, :5]]
    sums = ops.checksum(tensors)
    assert torch.equal(sums, shards.checksum_reference(tensors))
    assert sums[0] == sums[1] and sums[0] != sums[2]


@pytest.mark.parametrize("dtype", CHECKSUM_DTYPES)
def test_checksum(dtype: torch.dtype):
    check_checksum(OPS, dtype)


@pytest.fixture
def one_thread():
    """Keys are listed as threads come: with one, always in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_opcheck():
    for step in sample_inputs():
        some, clone = operands(step), step.clone()
        middle = top_key(some.wide) // 2
        torch.library.opcheck(OPS.shard_sample.default, (*some, 512))
        torch.library.opcheck(OPS.shard_survey.default, (*some, middle, middle + 5, 0))
        torch.library.opcheck(OPS.shard_histogram.default, (*some, None, [0], middle, 3, 64))
        torch.library.opcheck(OPS.shard_split.default, (*some, None, [0], [middle]))
        torch.library.opcheck(OPS.shard_ties.default, (*some, None, [0], middle, torch.tensor([0, 5, 9])))
        cuts = None, [middle] * len(step.weights), [3] * len(step.weights)
        torch.library.opcheck(OPS.shard_apply_.default, (*operands(clone), *cuts))
        torch.library.opcheck(OPS.checksum.default, (step.weights,))


def test_bad_arguments():
    weight = [torch.ones(4, dtype=torch.float64)]
    some = weight, [], [], [], True, True
    with pytest.raises(ValueError, match="shard_histogram: wide must be true for float64 scores, got false"):
        OPS.shard_histogram(weight, [], [], [], True, False, None, [0], 1, 0, 8)
    with pytest.raises(ValueError, match="at least 1, from 0 to 63 and from 0 to 2048, got 0, 0 and 8"):
        OPS.shard_histogram(*some, None, [0], 0, 0, 8)
    with pytest.raises(ValueError, match="shard_ties: ends must rise from 0 to 4 at most, got 0 to 5"):
        OPS.shard_ties(*some, None, [0], 1, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="shard_split: tensors must be from 0 to 0, got 1"):
        OPS.shard_split(*some, None, [1], [1])
    with pytest.raises(ValueError, match="shard_split: thresholds must be at least 1, got 0"):
        OPS.shard_split(*some, None, [0], [0])
    with pytest.raises(ValueError, match="shard_survey: low and high must be 0 <= low < high, got 3 and 3"):
        OPS.shard_survey(*some, 3, 3, 0)
    with pytest.raises(ValueError, match="shard_split: masks must not be empty unless they are fresh"):
        OPS.shard_split(weight, [], [], [], False, True, None, [0], [1])
    with pytest.raises(ValueError, match="shard_sample: count must be from 0 to 4, got 5"):
        OPS.shard_sample(*some, 5)

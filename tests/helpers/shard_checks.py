"""Whether ops do what the references of drive::shard_* and drive::checksum do, wherever they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from ugly import Step

from drive_kernels.prune import shards
from drive_kernels.prune.shards import COUNTS, Operands, top_key

INSIDE = COUNTS.index("inside")
CHECKSUM_DTYPES = (torch.bool, torch.bfloat16, torch.float32, torch.float64)


def operands(step: Step, scales: Sequence[float] = ()) -> Operands:
    wide = bool(step.mask_grads) or any(w.dtype == torch.float64 for w in step.weights)
    return Operands(step.weights, step.grads, step.mask_grads, step.masks, step.fresh, wide, scales)


def some_scales(step: Step) -> st.SearchStrategy[list[float]]:
    """None, or one of each tensor: of odd bits, and those that leave nothing or everything as it is."""
    size, one = len(step.weights), st.sampled_from((0.0, 1e-30, 0.1, 0.7071, 1.0))
    return st.just([]) | st.lists(one, min_size=size, max_size=size)


def keys(some: Operands) -> Tensor:
    """Of all entries, sorted."""
    found = [piece.keys for i in range(len(some.weights)) for piece in shards._pieces(some, i)]
    return torch.cat([torch.zeros(1, dtype=torch.int64), *found]).sort().values


def check_ops(ops: Any, step: Step, data: st.DataObject, scales: Sequence[float] = ()) -> None:
    """Each of these ops against its reference."""
    some = operands(step, scales)
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
    check_apply(ops, step, None, thresholds, tie_ends, scales)
    if low < threshold < high:
        last = data.draw(st.integers(0, entries[-1]))
        begins = zip(entries, step.weights, strict=False)
        first = [max(0, min(last - begin, w.numel())) for begin, w in begins]
        for ends in (tie_ends, first):
            check_apply(ops, step, (low, high), [threshold] * len(ends), ends, scales)


def check_apply(
    ops: Any,
    step: Step,
    bracket: tuple[int, int] | None,
    thresholds: list[int],
    tie_ends: list[int],
    scales: Sequence[float] = (),
) -> None:
    """After a survey with a bracket, or without one."""
    ours, theirs = step.clone(), step.clone()
    entries = sum(w.numel() for w in step.weights)
    mine = operands(ours, scales)
    listed = bracket and ops.shard_survey(*mine, *bracket, entries)[2]
    ops.shard_apply_(*mine, listed, thresholds, tie_ends)
    shards.apply_reference(*operands(theirs, scales), None, thresholds, tie_ends)
    for one, other in zip(ours.masks + ours.weights, theirs.masks + theirs.weights, strict=True):
        assert torch.equal(bits(one), bits(other))


def check_many_tensors(ops: Any) -> None:
    """More than there are warps, of which every second counts: a warp looks at several."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(60, (500,), generator=generator).tolist()
    weights = [torch.randint(1, 9, (n,), generator=generator).float() for n in sizes]
    some = Operands(weights, [], [], [], True, False, [])
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


def bits(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


def check_sample(ops: Any, step: Step, count: int, scales: Sequence[float] = ()) -> None:
    """One score of each part, and 0 for what is pruned."""
    some = operands(step, scales)
    count = min(count, sum(w.numel() for w in step.weights))
    sample = ops.shard_sample(*some, count)
    assert sample.shape == (count,) and sample.dtype == (torch.float64 if some.wide else torch.float32)
    found = sample.view(torch.int64 if some.wide else torch.int32).long() + 1
    assert torch.isin(found, keys(some).clamp(min=1)).all()


def check_checksum(ops: Any, dtype: torch.dtype) -> None:
    tensor = torch.randn(703, 301).round().to(dtype)
    swapped = tensor.flatten().clone()
    other = int((swapped != swapped[0]).nonzero()[0])
    swapped[[0, other]] = swapped[[other, 0]]
    tensors = [tensor, tensor.t().contiguous().t(), swapped, tensor.flatten()[1:], tensor[:0], tensor[0, :5]]
    sums = ops.checksum(tensors)
    assert torch.equal(sums, shards.checksum_reference(tensors))
    assert sums[0] == sums[1] and sums[0] != sums[2]

"""drive::shard_*: the compiled kernels against their references, on ugly inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from ugly import Step, sample_inputs, steps

from drive_kernels import shards
from drive_kernels.shards import COUNTS, Operands, top_key

OPS = torch.ops.drive


def operands(step: Step) -> Operands:
    wide = bool(step.mask_grads) or any(w.dtype == torch.float64 for w in step.weights)
    return Operands(step.weights, step.grads, step.mask_grads, [] if step.fresh else step.masks, wide)


def keys(some: Operands) -> Tensor:
    """Of all entries, sorted."""
    found = [piece.keys for i in range(len(some.weights)) for piece in shards._pieces(some, i)]
    return torch.cat([torch.zeros(1, dtype=torch.int64), *found]).sort().values


@settings(max_examples=150, deadline=None)
@given(steps(), st.data())
def test_equal_references(step: Step, data: st.DataObject):
    some = operands(step)
    ranked = keys(some)
    low, threshold, high = sorted(int(ranked[data.draw(st.integers(0, len(ranked) - 1))]) for _ in range(3))
    shift = data.draw(st.integers(0, 52 if some.wide else 20))
    found = OPS.shard_histogram(*some, low, shift, 100)
    assert torch.equal(found, shards.histogram_reference(*some, low, shift, 100))

    room = data.draw(st.sampled_from((0, 10, len(ranked))))
    counts, sums, inside, blocks = OPS.shard_survey(*some, low, high, room)
    expected = shards.survey_reference(*some, low, high, room)
    assert torch.equal(counts, expected[0])
    assert torch.allclose(sums, expected[1], rtol=1e-12, atol=0, equal_nan=True)
    column = counts[:, COUNTS.index("inside")]
    assert inside.numel() == (int(column.sum()) if column.sum() <= room else 0)
    if inside.numel() == column.sum():
        parts = zip(inside.split(column.tolist()), expected[2].split(column.tolist()), strict=True)
        assert all(torch.equal(a.sort().values, b.sort().values) for a, b in parts)
        assert torch.equal(blocks[:, 1], expected[3][:, 1])
        for begin, count in blocks.tolist():
            assert 0 <= begin <= begin + count <= inside.numel()

    t = data.draw(st.integers(0, len(step.weights) - 1))
    one = some.each(lambda tensors: [tensors[t]] if tensors else [])
    ends = st.lists(st.integers(0, step.weights[t].numel()), min_size=2, max_size=9).map(sorted)
    bounds = torch.tensor(data.draw(ends))
    for blocks in (None, torch.tensor([0])):
        found = OPS.shard_ties(*one, threshold, bounds, blocks)
        assert torch.equal(found, shards.ties_reference(*one, threshold, bounds, blocks))

    thresholds = [int(ranked[data.draw(st.integers(0, len(ranked) - 1))]) or 1 for _ in step.weights]
    tie_ends = [data.draw(st.integers(0, w.numel())) for w in step.weights]
    results = []
    for apply in (OPS.shard_apply_, shards.apply_reference):
        copy = step.clone()
        lists = copy.weights, copy.grads, copy.mask_grads, copy.masks
        apply(*lists, step.fresh, some.wide, thresholds, tie_ends)
        results.append([bits(t) for t in copy.masks + copy.weights])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def bits(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)


@settings(max_examples=50, deadline=None)
@given(steps(), st.integers(0, 5000))
def test_samples_are_entries(step: Step, count: int):
    some = operands(step)
    total = sum(w.numel() for w in step.weights)
    sample = OPS.shard_sample(*some, min(count, total))
    assert sample.numel() <= min(count, total)
    assert some.masks or sample.numel() == min(count, total)
    found = sample.view(torch.int64 if some.wide else torch.int32).long() + 1
    assert torch.isin(found, keys(some)).all()


def test_samples_are_spread():
    """One entry out of each equal part."""
    weights = [torch.arange(1.0, 30_001.0), torch.arange(30_001.0, 40_001.0)]
    sample = OPS.shard_sample(weights, [], [], [], False, 1000)
    assert ((sample - 1) // 40).long().sort().values.tolist() == list(range(1000))


@pytest.mark.parametrize("dtype", (torch.bool, torch.bfloat16, torch.float32, torch.float64))
def test_checksum(dtype: torch.dtype):
    tensor = torch.randn(700, 300).round().to(dtype)
    expected = shards.checksum_reference(tensor)
    assert torch.equal(OPS.checksum(tensor), expected)
    assert torch.equal(OPS.checksum(tensor.t().contiguous().t()), expected)
    swapped = tensor.flatten().clone()
    other = int((swapped != swapped[0]).nonzero()[0])
    swapped[[0, other]] = swapped[[other, 0]]
    assert not torch.equal(OPS.checksum(swapped), expected)


@pytest.fixture
def one_thread():
    """Scores are listed as threads come: with one, always in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_opcheck():
    for step in sample_inputs():
        some, clone = operands(step), step.clone()
        middle = top_key(some.wide) // 2
        torch.library.opcheck(OPS.shard_histogram.default, (*some, middle, 3, 64))
        torch.library.opcheck(OPS.shard_survey.default, (*some, middle, middle + 5, 100))
        one = some.each(lambda tensors: list(tensors[:1]))
        torch.library.opcheck(OPS.shard_ties.default, (*one, middle, torch.tensor([0, 5, 9]), None))
        cuts = [middle] * len(step.weights), [3] * len(step.weights)
        lists = clone.weights, clone.grads, clone.mask_grads, clone.masks
        torch.library.opcheck(OPS.shard_apply_.default, (*lists, step.fresh, some.wide, *cuts))
        torch.library.opcheck(OPS.checksum.default, (step.weights[0],))
        torch.library.opcheck(OPS.shard_sample.default, (*some, 512))


def test_bad_arguments():
    weight = [torch.ones(4, dtype=torch.float64)]
    with pytest.raises(ValueError, match="shard_histogram: wide must be true for float64 scores, got false"):
        OPS.shard_histogram(weight, [], [], [], False, 0, 0, 8)
    with pytest.raises(ValueError, match="shard_ties: ends must rise from 0 to 4 at most, got 0 to 5"):
        OPS.shard_ties(weight, [], [], [], True, 1, torch.tensor([0, 5]), None)

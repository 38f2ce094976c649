"""drive::shard_*: the compiled kernels against their references, on ugly inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_checks import (
    CHECKSUM_DTYPES,
    check_checksum,
    check_many_tensors,
    check_no_room,
    check_ops,
    check_sample,
    operands,
    some_scales,
)
from ugly import Step, sample_inputs, steps

from drive_kernels.prune.shards import top_key

OPS = torch.ops.drive


@settings(max_examples=150, deadline=None)
@given(steps(), st.data())
def test_equal_references(step: Step, data: st.DataObject):
    check_ops(OPS, step, data, data.draw(some_scales(step)))


def test_many_tensors():
    check_many_tensors(OPS)


def test_no_room():
    check_no_room(OPS)


@settings(max_examples=50, deadline=None)
@given(steps(), st.integers(0, 5000), st.data())
def test_samples_are_entries(step: Step, count: int, data: st.DataObject):
    check_sample(OPS, step, count, data.draw(some_scales(step)))


def test_samples_are_spread():
    """One entry out of each equal part."""
    weights = [torch.arange(1.0, 30_001.0), torch.arange(30_001.0, 40_001.0)]
    sample = OPS.shard_sample(weights, [], [], [], True, False, [], 1000)
    assert ((sample - 1) // 40).long().sort().values.tolist() == list(range(1000))


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
        scales = [0.3] * len(step.weights)
        some, clone = operands(step, scales), step.clone()
        middle = top_key(some.wide) // 2
        torch.library.opcheck(OPS.shard_sample.default, (*some, 512))
        torch.library.opcheck(OPS.shard_survey.default, (*some, middle, middle + 5, 0))
        torch.library.opcheck(OPS.shard_histogram.default, (*some, None, [0], middle, 3, 64))
        torch.library.opcheck(OPS.shard_split.default, (*some, None, [0], [middle]))
        torch.library.opcheck(OPS.shard_ties.default, (*some, None, [0], middle, torch.tensor([0, 5, 9])))
        cuts = None, [middle] * len(step.weights), [3] * len(step.weights)
        torch.library.opcheck(OPS.shard_apply_.default, (*operands(clone, scales), *cuts))
        torch.library.opcheck(OPS.checksum.default, (step.weights,))


def test_bad_arguments():
    weight = [torch.ones(4, dtype=torch.float64)]
    some = weight, [], [], [], True, True, []
    with pytest.raises(ValueError, match="shard_histogram: wide must be true for float64 scores, got false"):
        OPS.shard_histogram(weight, [], [], [], True, False, [], None, [0], 1, 0, 8)
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
        OPS.shard_split(weight, [], [], [], False, True, [], None, [0], [1])
    with pytest.raises(ValueError, match="shard_sample: count must be from 0 to 4, got 5"):
        OPS.shard_sample(*some, 5)
    with pytest.raises(ValueError, match=r"scales must have a number for each of 1 weights, or none, got 2"):
        OPS.shard_sample(weight, [], [], [], True, True, [1, 1], 1)
    with pytest.raises(ValueError, match=r"shard_sample: scales\[0\] must be from 0 to 1, got 1.5"):
        OPS.shard_sample(weight, [], [], [], True, True, [1.5], 1)

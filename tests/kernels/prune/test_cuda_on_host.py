"""csrc/**/*.cu without a GPU, against the oracle: threads are fibers on the host (helpers/cuda_on_host)."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from misleading import TRAPS, misleading
from rank_cases import case, cost_case, row_cases
from shard_checks import (
    CHECKSUM_DTYPES,
    check_apply,
    check_checksum,
    check_many_tensors,
    check_no_room,
    check_ops,
    check_sample,
    keys,
    operands,
    some_scales,
)
from torch.utils import cpp_extension
from ugly import CostStep, Step, cost_steps, laid_out, sample_inputs, steps, to_cost, valued
from worlds import returned, run

from drive_kernels import registry
from drive_kernels.prune.cost import reference as cost_reference
from drive_kernels.prune.op import reference

ROOT = Path(__file__).parents[3]
HERE = ROOT / "tests" / "helpers" / "cuda_on_host"


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """The module, built again whenever a source changes: 15 seconds."""
    sources = sorted([*HERE.rglob("*.*"), *(ROOT / "csrc").rglob("*.*")])
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + torch.__version__.encode())
    library = ROOT / "build" / "cuda_on_host" / f"cuda_on_host-{state.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        include = [*cpp_extension.include_paths("cpu"), sysconfig.get_paths()["include"]]
        lib = Path(torch.__file__).parent / "lib"
        subprocess.run(
            [
                "g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC",
                "-Wall", "-Wno-unknown-pragmas", "-DDRIVE_HOST_CUDA", "-DTORCH_EXTENSION_NAME=cuda_on_host",
                f"-I{HERE}", f"-I{ROOT / 'csrc'}", *(f"-isystem{path}" for path in include),
                str(HERE / "host.cpp"), "-o", str(library),
                f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10",
            ],
            check=True,
        )  # fmt: skip
    return load(library)


def load(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_on_host", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=(0, 1, 7), ids="order {}".format)
def ordered(request: pytest.FixtureRequest, host: ModuleType) -> ModuleType:
    """The same with threads and blocks in another order."""
    host.set_order(request.param)
    return host


def row_cases_on(library: Path, seeds: range) -> None:
    """With the ops of this module in place of the CPU's."""
    module = load(library)
    for name in ("sample", "survey", "histogram", "split", "ties", "apply_"):
        setattr(torch.ops.drive, f"shard_{name}", getattr(module, f"shard_{name}"))
    for each in (case, cost_case):
        row_cases(seeds, case=each)


def assert_same(host: ModuleType, step: Step) -> None:
    ours, theirs = step.clone(), step.clone()
    priced = isinstance(step, CostStep)
    kept, nonfinite, scores = (host.prune_to_cost_ if priced else host.prune_)(*ours.args())
    expected = (cost_reference if priced else reference)(*theirs.args())
    for mine, other in zip(ours.masks + ours.weights, theirs.masks + theirs.weights, strict=True):
        assert torch.equal(mine, other)
    for weight, mask in zip(ours.weights, ours.masks, strict=True):
        assert expected[1].any() or not weight[~mask].signbit().any(), "pruned weights are +0, never -0"
    assert torch.equal(kept, expected[0])
    assert torch.equal(nonfinite, expected[1])
    # float64 sums in another order
    torch.testing.assert_close(scores, expected[2], rtol=1e-12, atol=0, equal_nan=True)


def test_emulation_notices_mistakes(host: ModuleType):
    sums = []
    for order in (0, 1, 7):
        host.set_order(order)
        assert host.neighbours(True) == 64 * 65 // 2
        sums.append(host.neighbours(False))
        with pytest.raises(RuntimeError, match="different intrinsics"):
            host.diverging()
        with pytest.raises(RuntimeError, match="a barrier that others never reach"):
            host.leaving()
    assert len(set(sums)) > 1


def test_what_the_gpu_cannot_run_goes_on_elsewhere(host: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """To what Python has for it, with the arguments as they are."""
    calls = []

    def serving(name: str, gpu: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def serve(weights: list[torch.Tensor], *rest: object) -> tuple[torch.Tensor, ...]:
            calls.append((name, gpu, [w.device for w in weights], *rest))
            return torch.ones(1), torch.zeros(1), torch.ones(2)

        return serve

    monkeypatch.setattr(registry, "_serving", serving)
    kept, nonfinite, scores = host.prune_on_gpu("no kernel image")
    assert calls == [("prune_", 1, [torch.device("cuda:1")], [], [], [], True, 7, 1)]
    assert (kept.sum(), nonfinite.sum(), scores.sum()) == (1, 0, 2)
    with pytest.raises(
        ValueError, match="prune_: .*one length"
    ):  # where it can, the kernel runs, and refuses
        host.prune_on_gpu(None)
    assert len(calls) == 1


@pytest.mark.parametrize("index", range(len(sample_inputs())))
def test_sample_inputs(ordered: ModuleType, index: int):
    assert_same(ordered, sample_inputs()[index])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(step=steps() | cost_steps(), order=st.integers(0, 5), poison=st.booleans(), at=st.integers(0, 2**20))
def test_equals_reference(host: ModuleType, step: Step, order: int, poison: bool, at: int):
    weight = step.weights[at % len(step.weights)]
    if poison and at % 5 == 0 and weight.numel():
        weight[tuple(at % size for size in weight.shape)] = torch.inf
    host.set_order(order)
    assert_same(host, step)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("values", ("normal", "ties", "equal"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_many_chunks(host: ModuleType, dtype: torch.dtype, values: str, layout: str):
    """Large enough for sampling, with ties that end in the middle of a tensor."""
    generator = torch.Generator().manual_seed(1)
    shapes = ([32, 64, 3, 3], [30_003], [7], [96, 64, 3, 3])
    weights = [laid_out(valued(s, dtype, values, generator), layout) for s in shapes]
    grads = [laid_out(valued(s, dtype, values, generator), layout) for s in shapes]
    masks = [torch.rand(s, generator=generator) < 0.9 for s in shapes]
    total = sum(w.numel() for w in weights)
    for fraction, fresh in ((0.001, False), (0.5, True), (0.95, False)):
        assert_same(host, Step(weights, grads, [], masks, fresh, round(fraction * total), 0))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_guards(ordered: ModuleType, dtype: torch.dtype):
    """Tensors that would lose nearly everything keep their best entries, ties included; the others pay."""
    generator = torch.Generator().manual_seed(2)
    shapes = ([40, 30, 3, 3], [9000], [300], [50])
    for values in ("normal", "ties"):
        weights = [laid_out(valued(s, dtype, values, generator), "channels_last") for s in shapes]
        grads = [valued(s, dtype, values, generator) for s in shapes]
        for weight in weights[1:3]:
            weight.mul_(1e-3)
        masks = [torch.rand(s, generator=generator) < 0.5 for s in shapes]
        for fresh in (True, False):
            assert_same(ordered, Step(weights, grads, [], masks, fresh, 18_000, 200))


@pytest.mark.parametrize("trap", TRAPS)
def test_misleading_sample(host: ModuleType, trap: str):
    for step in misleading(trap, 70_003, 1 << 14):
        assert_same(host, step)
        assert_same(host, to_cost(step, [3], 0.0, 1 - step.prune / 70_003))


def test_large_sample(ordered: ModuleType):
    """From 2^20 entries on the sample is larger, and the list smaller than it could be at worst."""
    n = (1 << 20) + 77
    generator = torch.Generator().manual_seed(4)
    weight, grad = (torch.randn(n, generator=generator) for _ in range(2))
    mask = torch.ones(n, dtype=torch.bool)
    assert_same(ordered, Step([weight], [grad], [], [mask], True, n - n // 10, 0))


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("offsets", ((1, 1, 1), (0, 1, 0), (3, 0, 5), (5, 5, 4), (0, 0, 1)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_unaligned(host: ModuleType, dtype: torch.dtype, offsets: tuple[int, int, int], layout: str):
    """Views that begin some entries into their memory: heads and tails apart, or operands entry by entry."""
    generator = torch.Generator().manual_seed(5)
    shape = (41, 61, 3, 3)
    n = 41 * 61 * 9
    tensors = [valued([n + 8], dtype, "ties", generator) for _ in range(2)]
    mask = torch.rand(n + 8, generator=generator) < 0.9
    order = (0, 3, 1, 2) if layout == "channels_last" else (0, 1, 2, 3)
    stride = torch.empty(shape).permute(order).contiguous().permute(*map(order.index, range(4))).stride()
    for fresh in (True, False):
        pairs = zip((*tensors, mask), offsets, strict=True)
        views = [tensor.clone().as_strided(shape, stride, offset) for tensor, offset in pairs]
        assert [v.data_ptr() % 16 for v in views[:2]] == [o * dtype.itemsize % 16 for o in offsets[:2]]
        step = Step(views[:1], views[1:2], [], views[2:], fresh, n // 2, 0)
        theirs = step.clone()
        expected = reference(*theirs.args())
        kept, _, _ = host.prune_(*step.args())
        assert torch.equal(kept, expected[0])
        assert torch.equal(step.masks[0], theirs.masks[0]) and torch.equal(step.weights[0], theirs.weights[0])
        for view, tensor, offset in ((views[0], tensors[0], offsets[0]), (views[2], mask, offsets[2])):
            whole = view.as_strided((n + 8,), (1,), 0)  # nothing beside the view is written
            assert torch.equal(whole[:offset], tensor[:offset])
            assert torch.equal(whole[offset + n :], tensor[offset + n :])


@pytest.mark.parametrize("size", (1, 2, 3, 7, 9, 641, 1 << 20, (1 << 30) + 1, (1 << 31) - 1))
def test_division_by_a_product(host: ModuleType, size: int):
    largest = (1 << 31) - 1
    near = [m + d for m in (size, size * (largest // size)) for d in (-1, 0, 1)]
    some = torch.randint(largest, (500,), generator=torch.Generator().manual_seed(size)).tolist()
    for n in (0, *near, *some):
        if 0 <= n <= largest:
            assert host.divided(n, size) == n // size
    assert host.divided((1 << 40) + 5, size) == ((1 << 40) + 5) // size


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_guards_of_large_tensors(ordered: ModuleType, dtype: torch.dtype):
    """From 2^18 entries on many blocks count a tensor's guard, in the memory that bits and list were in."""
    generator = torch.Generator().manual_seed(7)
    shapes = ([(1 << 18) + 5], [1000], [64, 64, 9, 9])
    weights = [laid_out(valued(s, dtype, "ties", generator), "channels_last") for s in shapes]
    grads = [valued(s, dtype, "ties", generator) for s in shapes]
    for weight in weights[:2]:
        weight.mul_(1e-3)
    masks = [torch.rand(s, generator=generator) < 0.5 for s in shapes]
    total = sum(w.numel() for w in weights)
    assert_same(ordered, Step(weights, grads, [], masks, False, total - 20_000, 900))


@pytest.mark.parametrize("min_keep", (0, 1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sizes", ([64] * 10_000, [40, 3000] * 5000, [1 << 18] * 50, [1 << 26]), ids=sum)
def test_scratch_is_bounded(host: ModuleType, sizes: list[int], dtype: torch.dtype, min_keep: int):
    """A quarter of a byte an entry and 4 MB, ten thousand tensors and their guards included."""
    ones, kept = torch.ones(1, dtype=dtype), torch.ones(1, dtype=torch.bool)
    weights, masks = ([one.expand(n) for n in sizes] for one in (ones, kept))
    bound = sum(sizes) / 4 + (4 << 20)
    assert host.scratch(weights, weights, masks, min_keep) <= bound


@pytest.mark.parametrize("fresh", (True, False))
@pytest.mark.parametrize("bad", (torch.nan, -torch.inf, 1e38))
def test_non_finite_scores_change_nothing(host: ModuleType, bad: float, fresh: bool):
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(s, generator=generator) for s in (5000, 20_000, 33)]
    grads = [torch.randn(w.shape, generator=generator) for w in weights]
    masks = [torch.rand(w.shape, generator=generator) < 0.9 for w in weights]
    grads[1][[3, 17, 19_999]] = bad
    weights[1][[3, 17, 19_999]] = 1e3  # 1e38 * 1e3 overflows
    step = Step(weights, grads, [], masks, fresh, 10_000, 3)
    ours = step.clone()
    _, nonfinite, scores = host.prune_(*ours.args())
    assert scores.isnan().all() and nonfinite[1] > 0 and nonfinite[0] == nonfinite[2] == 0
    assert all(map(torch.equal, ours.weights, weights))
    assert_same(host, step)


@pytest.mark.parametrize("n", (30_003, (1 << 18) + 5))
@pytest.mark.parametrize("values", ("normal", "ties", "equal"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_to_cost_in_many_chunks(host: ModuleType, dtype: torch.dtype, values: str, n: int):
    """Large enough for sampling and, from 2^18 entries on, for a guard that many blocks count."""
    host.set_order(7)
    generator = torch.Generator().manual_seed(8)
    shapes = ([32, 64, 3, 3], [n], [7], [40, 64, 3, 3])
    weights, grads = (
        [laid_out(valued(s, dtype, values, generator), "channels_last") for s in shapes] for _ in range(2)
    )
    masks = [torch.rand(s, generator=generator) < 0.9 for s in shapes]
    for costs, alpha, share, min_keep in (
        ((3136, 1, 2**30, 196), 0.5, 0.02, 0),
        ((3136, 1, 2**20, 196), 0.5, 0.05, 400),
        ((2, 3, 5, 7), 0.0, 0.3, 0),
        ((1, 1, 1, 1), 0.5, 0.97, 0),
    ):
        step = Step(weights, grads, [], masks, share == 0.02, 0, min_keep)
        assert_same(host, to_cost(step, costs, alpha, share))


@pytest.mark.parametrize("left", range(0, 12, 3))
def test_none_on_the_threshold_survives(host: ModuleType, left: int):
    """The next larger key counts, found in the list, at an edge of the bracket or among all entries."""
    keys = torch.tensor([5.0, 4.0, 3.0, 2.0])
    for sizes in ((9, 7), (30_000, 7), (7, 30_000), (40_000, 40_000)):
        weights = [keys.repeat_interleave(-(-n // 4))[:n].contiguous() for n in sizes]
        masks = [torch.ones(n, dtype=torch.bool) for n in sizes]
        for min_keep in (0, 3):
            step = Step(weights, [], [], masks, True, 0, min_keep)
            whole = to_cost(step, [1000, 10], 0.0, 1.0)
            for key in keys.tolist():
                above = sum(int((w > key).sum()) * c for w, c in zip(weights, whole.costs, strict=True))
                budget = max(above + 100 * left, whole.min_keep * sum(whole.costs))
                assert_same(host, replace(whole, max_cost=budget))


# ---- drive::shard_*, and drive::checksum ----


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(step=steps(), order=st.integers(0, 5), data=st.data())
def test_shard_ops_equal_references(host: ModuleType, step: Step, order: int, data: st.DataObject):
    host.set_order(order)
    check_ops(host, step, data, data.draw(some_scales(step)))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(step=steps(), count=st.integers(0, 5000), data=st.data())
def test_shard_sample(host: ModuleType, step: Step, count: int, data: st.DataObject):
    check_sample(host, step, count, data.draw(some_scales(step)))


def test_shard_ops_on_many_tensors(ordered: ModuleType):
    check_many_tensors(ordered)


def test_shard_survey_without_room(ordered: ModuleType):
    check_no_room(ordered)


@pytest.mark.parametrize("mask_layout", ("contiguous", "sliced"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_shard_ties_at_the_ends_of_blocks(
    host: ModuleType, dtype: torch.dtype, layout: str, mask_layout: str
):
    """Nothing but ties, of which the last survivor is the first or last entry of a tensor or a chunk."""
    shapes = ([96, 64, 3, 3], [0, 5], [30_003], [7], [16, 64, 3, 3])
    weights = [laid_out(torch.ones(s, dtype=dtype), layout) for s in shapes]
    masks = [laid_out(torch.ones(s, dtype=torch.bool), mask_layout) for s in shapes]
    step = Step(weights, [], [], masks, True, 0, 0)
    some = operands(step)
    one = int(keys(some)[-1])
    listed = host.shard_survey(*some, one - 1, one + 1, 200_000)[2]
    sizes = [w.numel() for w in weights]
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    for edge in (1, 4096, 8192, sizes[0], sizes[0] + 4096, sizes[0] + sizes[2], sum(sizes)):
        for last in (edge - 1, edge, edge + 1):
            ends = [max(0, min(last - begin, size)) for begin, size in zip(begins, sizes, strict=True)]
            for bracket in (None, (one - 1, one + 1)):
                check_apply(host, step, bracket, [one] * len(ends), ends)
    ends = torch.tensor([0, 1, 4095, 4096, 4097, 8192, sizes[0]])
    for found in (None, listed):
        assert torch.equal(host.shard_ties(*some, found, [0], one, ends), ends.diff())


@pytest.mark.parametrize("dtype", CHECKSUM_DTYPES)
def test_checksum(ordered: ModuleType, dtype: torch.dtype):
    check_checksum(ordered, dtype)


def test_shard_ops_refuse_what_another_survey_has_listed(host: ModuleType):
    small, large = ([torch.ones(n)] for n in (10, 100_000))
    listed = host.shard_survey(small, [], [], [], True, False, [], 0, 10, 5)[2]
    with pytest.raises(ValueError, match="shard_split: listed must be of a survey of these tensors, got"):
        host.shard_split(large, [], [], [], True, False, [], listed, [0], [1])


def test_sharded_steps(host: ModuleType):
    returned(run(2, row_cases_on, Path(str(host.__file__)), range(12)))

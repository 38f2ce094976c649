"""drive::prune_ against its reference: the same masks bit for bit, whatever the input."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from misleading import TRAPS, misleading
from processes import run_on
from ugly import Step, laid_out, sample_inputs, steps, valued

import drive_kernels
from drive_kernels.prune.op import kth_by_kthvalue, reference

prune_ = torch.ops.drive.prune_


@pytest.fixture(autouse=True)
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def assert_same(step: Step, **options: object) -> None:
    ours, theirs = step.clone(), step.clone()
    kept, nonfinite, scores = prune_(*ours.args())
    expected = reference(*theirs.args(), **options)
    for mine, other in zip(ours.masks + ours.weights, theirs.masks + theirs.weights, strict=True):
        assert torch.equal(mine, other)
    for weight, mask in zip(ours.weights, ours.masks, strict=True):
        assert not weight[~mask].signbit().any(), "pruned weights are +0, never -0"
    assert torch.equal(kept, expected[0])
    assert torch.equal(nonfinite, expected[1])
    # float64 sums in another order
    torch.testing.assert_close(scores, expected[2], rtol=1e-12, atol=0)


def test_compiled_kernel_is_there():
    assert drive_kernels.build_error is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("drive::prune_", "CPU")


@pytest.mark.parametrize("index", range(len(sample_inputs())))
def test_opcheck(index: int):
    step = sample_inputs()[index]
    torch.library.opcheck(prune_, step.args())


def test_compiles_into_one_graph():
    step = sample_inputs()[0]
    compiled, eager = step.clone(), step.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(weights, grads, masks):
        return prune_(weights, grads, [], masks, step.fresh, step.prune, step.min_keep)

    kept = run(compiled.weights, compiled.grads, compiled.masks)[0]
    assert torch.equal(kept, prune_(*eager.args())[0])
    assert torch.equal(compiled.weights[0], eager.weights[0])
    assert torch.equal(compiled.masks[0], eager.masks[0])


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(step=steps(), threads=st.sampled_from((1, 2)))
def test_equals_reference(step: Step, threads: int):
    torch.set_num_threads(threads)
    assert_same(step)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("values", ("normal", "ties", "equal", "half zero"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_many_chunks(dtype: torch.dtype, values: str, layout: str):
    """Large enough for sampling, several threads, ties that end in the middle of a tensor."""
    generator = torch.Generator().manual_seed(1)
    shapes = ([32, 64, 3, 3], [30_003], [7], [160, 64, 3, 3])
    weights = [laid_out(valued(list(s), dtype, values, generator), layout) for s in shapes]
    grads = [laid_out(valued(list(s), dtype, values, generator), layout) for s in shapes]
    total = sum(w.numel() for w in weights)
    for fraction in (0.001, 0.5, 0.95):
        masks = [torch.rand(w.shape, generator=generator) < 0.9 for w in weights]
        for fresh in (True, False):
            assert_same(Step(weights, grads, [], masks, fresh, round(fraction * total), 0))


def test_kthvalue_reference_agrees():
    for step in sample_inputs():
        assert_same(step, kth_largest=kth_by_kthvalue)


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_misleading_sample(trap: str, dtype: torch.dtype):
    for step in misleading(trap, 1_000_003, 1 << 14, dtype):
        assert_same(step)


def test_scores_do_not_depend_on_threads():
    for step in sample_inputs():
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(prune_(*step.clone().args()))
        for one, two in zip(*outputs, strict=True):
            assert torch.equal(one, two)


def digest(inputs: str) -> str:
    """A hash of everything that some saved steps change and return."""
    state = hashlib.sha256()
    for arguments in torch.load(inputs):
        outputs = prune_(*arguments)
        for tensor in (*arguments[0], *arguments[3], *outputs):
            state.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@pytest.mark.parametrize("capability", ("default", "avx2", "avx512"))
def test_variants_agree(capability: str, tmp_path: Path):
    """Masks, weights, counts and even the sums are the same bits on every instruction set."""
    inputs = tmp_path / "steps.pt"  # saved: PyTorch's own random numbers differ between the variants
    torch.save([step.args() for step in sample_inputs()], inputs)
    assert run_on(capability, tmp_path, digest, str(inputs)) == digest(str(inputs))


def test_denormals_count_under_flush_to_zero():
    weight, grad = torch.full((3000,), 1e-22), torch.linspace(-1e-22, 1e-22, 3000)
    step = Step([weight], [grad], [], [torch.ones(3000, dtype=torch.bool)], True, 1500, 0)
    plain, flushed = step.clone(), step.clone()
    prune_(*plain.args())
    try:
        assert torch.set_flush_denormal(True)
        prune_(*flushed.args())
        assert torch.full((), 1e-22) * 1e-22 == 0, "the caller's mode is back"
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(plain.masks[0], flushed.masks[0])
    assert plain.masks[0].sum() == 1500


@pytest.mark.parametrize("fresh", (True, False))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf, 1e38))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_non_finite_scores_change_nothing(dtype: torch.dtype, bad: float, fresh: bool):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(s, generator=generator).to(dtype) for s in (5000, 20_000, 33)]
    grads = [torch.randn(w.shape, generator=generator).to(dtype) for w in weights]
    masks = [torch.rand(w.shape, generator=generator) < 0.9 for w in weights]
    masks[1][[17, 19_999]] = True
    masks[1][3] = False
    grads[1][[3, 17, 19_999]] = bad  # entry 3 is pruned in the old masks
    weights[1][[3, 17, 19_999]] = 1e3  # 1e38 * 1e3 overflows
    step = Step(weights, grads, [], masks, fresh, 10_000, 0)
    ours, theirs = step.clone(), step.clone()
    kept, nonfinite, scores = prune_(*ours.args())
    assert nonfinite.tolist() == [0, 3 if fresh else 2, 0]
    assert scores.isnan().all()
    assert torch.equal(kept, reference(*theirs.args())[0])
    for mine, before in zip(ours.weights, step.weights, strict=True):
        assert torch.equal(mine, before)
    for mine, before in zip(ours.masks, step.masks, strict=True):
        assert mine.all() if fresh else torch.equal(mine, before)


def test_bumps_version_counters():
    weight = torch.randn(10, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        prune_([weight], [torch.ones(10)], [], [torch.ones(10, dtype=torch.bool)], True, 5, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    (
        ({"masks": []}, ValueError, "must be of one length .* got 1, 1, 0, 0"),
        ({"grads": [], "mask_grads": [torch.ones(2)]}, ValueError, "must be of one length .* got 1, 0, 1, 1"),
        ({"grads": [torch.ones(3)]}, ValueError, r"grads\[0\] must have shape \[2\], got \[3\]"),
        ({"grads": [torch.ones(2).double()]}, TypeError, r"grads\[0\] must be Float, got Double"),
        ({"masks": [torch.ones(2)]}, TypeError, r"masks\[0\] must be Bool, got Float"),
        ({"weights": [torch.ones(2).int()]}, TypeError, r"weights\[0\] must be float32.* got Int"),
        ({"prune": -1}, ValueError, "must be >= 0, got -1, 0"),
    ),
)
def test_refuses(changed: dict[str, object], error: type[Exception], message: str):
    good = Step([torch.ones(2)], [torch.ones(2)], [], [torch.ones(2, dtype=torch.bool)], True, 1, 0)
    bad = Step(**{**good.__dict__, **changed})
    with pytest.raises(error, match=message):
        prune_(*bad.args())


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return 0.0


@pytest.mark.skipif(available_gib() < 10, reason="needs 10 GiB of free memory")
def test_more_than_2_31_entries():
    """One tensor of 2^31 + 5000 equal scores: the ties end beyond the reach of 32-bit indices."""
    n, prune = 2**31 + 5000, 1000
    weight = torch.ones(n, dtype=torch.bfloat16)
    mask = torch.empty(n, dtype=torch.bool)
    grad = torch.ones((), dtype=torch.bfloat16).expand(n)
    kept, _, scores = prune_([weight], [grad], [], [mask], True, prune, 0)
    assert kept.item() == n - prune
    assert scores[1].item() == n
    assert mask[: n - prune].all() and not mask[n - prune :].any()
    assert not weight[n - prune :].any() and weight[n - prune - 1] == 1

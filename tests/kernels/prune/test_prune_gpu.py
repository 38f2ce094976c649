"""drive::prune_ on a CUDA device, compiled and in Triton, against the CPU: the same bits, whatever the input.

`-k parity` picks the comparisons; the rest is what only a device can get wrong: streams, graphs, memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_prune_op import sampled_positions
from torch import Tensor
from ugly import LAYOUTS, NARROW, Step, laid_out, sample_inputs, steps, valued

from drive.experiments.bench import workload
from drive.experiments.bench.workload import SCORES, Case, Inputs, prove, vgg16_shapes
from drive.fused import PruneOp, prune_step
from drive.masks import Masks
from drive.reference import drive_prune
from drive.result import PruneResult
from drive_kernels.prune.op import reference

DEVICE = "cuda"
GIB = 1 << 30
pytestmark = pytest.mark.gpu


def implementation(name: str) -> PruneOp:
    try:
        return workload.implementation(name)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(params=("compiled", "triton"))
def prune_(request: pytest.FixtureRequest) -> PruneOp:
    return implementation(request.param)


def memory(tensor: Tensor) -> Tensor:
    """All bytes that a tensor is a view of, on the CPU: what lies between its entries too."""
    nbytes = tensor.untyped_storage().nbytes()
    return tensor.as_strided((nbytes // tensor.element_size(),), (1,), 0).view(torch.uint8).cpu()


ORACLES = (torch.ops.drive.prune_, reference)


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


cached_positions = functools.cache(sampled_positions)


@pytest.mark.parametrize(("n", "samples"), ((1_000_003, 1 << 14), (4_000_037, 1 << 17)))
@pytest.mark.parametrize("trap", ("threshold far below", "threshold far above", "bracket too full"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_parity_with_misleading_sample(prune_: PruneOp, dtype: torch.dtype, trap: str, n: int, samples: int):
    """Scores made so that the sample is wrong: the counts must notice, and the masks stay exact."""
    grad = torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=dtype) + 1
    position = cached_positions(n, samples)
    if trap == "threshold far below":
        grad[position] += 100
    elif trap == "threshold far above":
        grad[position] /= 100
    else:  # the sample is spread evenly over [0, 3], all else lies within its middle
        grad = 1.5 + grad * 1e-3
        grad[position] = torch.linspace(0, 3, samples, dtype=dtype)
    mask = torch.ones(n, dtype=torch.bool)
    for prune in (n // 2, n // 10, n - n // 10):
        step = Step([torch.ones(n, dtype=dtype)], [grad], [], [mask], True, prune, 0)
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


@pytest.mark.parametrize("scores", ("normal", "equal"))
def test_more_than_2_31_entries(prune_: PruneOp, scores: str):
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of free GPU memory")
    inputs = Inputs([(2**31 + 5000,)], torch.bfloat16, DEVICE, scores)
    prove(inputs, Case("2^31", torch.bfloat16, 1000 / inputs.entries, old_masks=False), prune_)
    prove(inputs, Case("2^31", torch.bfloat16, 0.9, old_masks=False), prune_)


@pytest.mark.parametrize("old_masks", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_repeats_to_the_bit(prune_: PruneOp, dtype: torch.dtype, old_masks: bool):
    """Sums included, whichever blocks are where: others run at the same time, each time another number."""
    inputs, case = Inputs(vgg16_shapes(), dtype, DEVICE), Case("138M", dtype, 0.9, old_masks)
    inputs.begin(case)
    beside, square = torch.cuda.Stream(), torch.ones(1024, 1024, device=DEVICE)
    found: list[list[Tensor]] = []
    for number in range(8):
        inputs.fresh()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(4 * number):
                torch.mm(square, square)
        outputs = prune_(*inputs.arguments(case))
        torch.cuda.synchronize()
        found.append([t.clone().view(torch.uint8) for t in (*outputs, inputs.mask, inputs.weight)])
        assert all(map(torch.equal, found[0], found.pop() if number else found[0]))


class Model:
    """Weights, gradients and masks on the device, as a training loop has them, and their twins on the CPU."""

    def __init__(self, seed: int, entries: int = 3_000_000):
        self.generator = torch.Generator().manual_seed(seed)
        shapes = ([entries // 9, 3, 3], [1000, 10], [77])
        self.expected = [torch.randn(s, generator=self.generator) for s in shapes]
        self.expected_masks: Masks | None = None
        self.grads = [torch.zeros(s, device=DEVICE) for s in shapes]
        self.weights = [w.to(DEVICE) for w in self.expected]
        self.masks: Masks | None = None

    def new_grads(self) -> list[Tensor]:
        """Other gradients, on the CPU and pinned."""
        return [torch.randn(g.shape, generator=self.generator).pin_memory() for g in self.grads]

    def load(self, grads: list[Tensor]) -> None:
        """Copies gradients to the device, in the order of the current stream."""
        for own, new in zip(self.grads, grads, strict=True):
            own.copy_(new, non_blocking=True)

    def step(self, prune_: PruneOp, sparsity: float) -> PruneResult:
        result = prune_step(
            prune_, "test", self.weights, self.grads, None,
            sparsity=sparsity, masks=self.masks, min_keep=0, include=None, check_finite=False,
        )  # fmt: skip
        self.masks = result.masks
        return result

    def expect(self, grads: list[Tensor], sparsity: float) -> None:
        """The same step on the CPU."""
        result = drive_prune(self.expected, grads, sparsity=sparsity, masks=self.expected_masks)
        self.expected_masks = result.masks

    def check(self) -> None:
        for ours, expected in zip(self.weights, self.expected, strict=True):
            assert torch.equal(ours.cpu(), expected)
        for ours, expected in zip(self.masks.values(), self.expected_masks.values(), strict=True):
            assert torch.equal(ours.cpu(), expected)


def warm_up(prune_: PruneOp) -> None:
    """Kernels are compiled and loaded at their first launch, which may wait for the device."""
    model = Model(0)
    model.load(model.new_grads())
    model.step(prune_, 0.1)
    torch.cuda.synchronize()


@pytest.mark.parametrize("fresh", (True, False))
def test_graph_replay(prune_: PruneOp, fresh: bool):
    """One capture serves changed gradients; steps between the replays must not disturb what it holds."""
    warm_up(prune_)
    model = Model(1)
    if not fresh:
        model.masks = Masks(
            {str(i): torch.ones_like(w, dtype=torch.bool) for i, w in enumerate(model.weights)}
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model.step(prune_, 0.6)
    for seed in (2, 3):
        other = Model(seed, entries=30_000)
        other.load(other.new_grads())
        other.step(prune_, 0.5)
        grads = model.new_grads()
        model.load(grads)
        for weight, mask in zip(model.weights, model.masks.values(), strict=True):
            weight.fill_(1)
            mask.fill_(True)
        model.expected = [torch.ones(w.shape) for w in model.weights]
        model.expected_masks = None
        graph.replay()
        model.expect(grads, 0.6)
        model.check()
        assert result.ok and result.pruned == round(0.6 * result.total)


def test_side_streams(prune_: PruneOp):
    """A queue of steps on two streams that are kept waiting: each sees the inputs made on its own stream."""
    warm_up(prune_)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    models = [Model(seed, entries) for seed, entries in enumerate((3_000_000, 90_000, 1_000_000, 300_000))]
    plan = [(model, model.new_grads(), sparsity) for sparsity in (0.2, 0.5, 0.9) for model in models]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(300_000_000)
    for model, grads, sparsity in plan:
        with torch.cuda.stream(streams[models.index(model) % 2]):
            model.load(grads)
            model.step(prune_, sparsity)
    for model, grads, sparsity in plan:
        model.expect(grads, sparsity)
    torch.cuda.synchronize()
    for model in models:
        model.check()


def test_never_waits_for_the_device(prune_: PruneOp):
    warm_up(prune_)
    model = Model(4)
    grads = model.new_grads()
    model.load(grads)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        slept = torch.cuda.Event()
        torch.cuda._sleep(2_000_000_000)  # about a second
        slept.record()
        model.step(prune_, 0.5)
        assert not slept.query(), "the call came back while the device was still asleep"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    model.expect(grads, 0.5)
    model.check()


def fill_memory() -> list[Tensor]:
    """Takes all but some hundred bytes of the device memory that this process may have."""
    taken = []
    for nbytes in (64 << 20, 8 << 20, (1 << 20) + 512, 1 << 20, 64 << 10, 512):
        while True:
            try:
                taken.append(torch.empty(nbytes, dtype=torch.uint8, device=DEVICE))
            except torch.OutOfMemoryError:
                break
    return taken


@pytest.fixture
def little_memory() -> Iterator[Callable[[], None]]:
    """Limits the process, when called, to what it holds and 16 MiB."""

    def limit() -> None:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() + (16 << 20)
        torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("free", (0, 1 << 10, 1 << 16, 1 << 20, 8 << 20), ids="{} bytes left".format)
@pytest.mark.parametrize("old_masks", (False, True))
def test_out_of_memory_changes_nothing(
    prune_: PruneOp, little_memory: Callable[[], None], old_masks: bool, free: int
):
    """Wherever in the step memory ends, it raises before anything is written, or it does all its work."""
    warm_up(prune_)
    case = Case("256M", torch.bfloat16, 0.9, old_masks)
    inputs = Inputs([(256, 1000, 1000)], case.dtype, DEVICE)
    inputs.begin(case)
    inputs.fresh()
    before = [t.clone() for t in (inputs.weight, inputs.mask, inputs.grad)]
    spare = torch.empty(max(free, 1), dtype=torch.uint8, device=DEVICE)
    little_memory()
    taken = fill_memory()
    del spare
    try:
        prune_(*inputs.arguments(case))
        failed = False
    except torch.OutOfMemoryError:
        failed = True
    del taken
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed or free, "the scratch of a step fits into no memory"
    if failed:
        assert all(map(torch.equal, (inputs.weight, inputs.mask, inputs.grad), before))
    prove(inputs, case, prune_)


def test_scratch_is_small(prune_: PruneOp):
    """At most a quarter of a byte an entry, and 4 MiB."""
    inputs = Inputs(vgg16_shapes(), torch.float32, DEVICE)
    for case in (Case("138M", torch.float32, 0.9, old_masks) for old_masks in (False, True)):
        inputs.begin(case)
        inputs.run(prune_, case)
        inputs.fresh()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prune_(*inputs.arguments(case))
        extra = torch.cuda.max_memory_allocated() - before
        assert extra <= inputs.entries // 4 + (4 << 20), f"{extra / inputs.entries:.3f} bytes an entry"


def test_refuses_two_devices(prune_: PruneOp):
    here, there = torch.ones(4, device=DEVICE), torch.ones(4)
    mask = torch.ones(4, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match=r"grads\[0\] must be on cuda:0, got cpu"):
        prune_([here], [there], [], [mask], True, 2, 0)
    with pytest.raises(ValueError, match=r"masks\[0\] must be on cuda:0, got cpu"):
        prune_([here], [here], [], [mask.cpu()], True, 2, 0)
    with pytest.raises(ValueError, match=r"weights\[1\] must be on cuda:0.* got cpu"):
        prune_([here, there], [here, there], [], [mask, mask.cpu()], True, 2, 0)
    assert here.all() and there.all() and mask.all()


def test_second_device(prune_: PruneOp):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for step in sample_inputs():
        there, expected = step.to("cuda:1"), step.to("cpu")
        assert torch.cuda.current_device() == 0
        kept = prune_(*there.args())[0]
        assert torch.equal(kept.cpu(), reference(*expected.args())[0])
        assert all(torch.equal(a.cpu(), b) for a, b in zip(there.masks, expected.masks, strict=True))
    with pytest.raises(ValueError, match="must be on"):
        prune_([torch.ones(4, device="cuda:0")], there.grads[:1], [], there.masks[:1], True, 2, 0)


@pytest.mark.parametrize("index", range(len(sample_inputs())))
def test_opcheck(index: int):
    torch.library.opcheck(implementation("compiled"), sample_inputs()[index].to(DEVICE).args())


def test_compiles_into_one_graph():
    prune_ = implementation("compiled")
    step = sample_inputs()[0].to(DEVICE)
    compiled, eager = step.clone(), step.clone()

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def run(weights, grads, masks):
        return prune_(weights, grads, [], masks, step.fresh, step.prune, step.min_keep)

    kept = run(compiled.weights, compiled.grads, compiled.masks)[0]
    assert torch.equal(kept, prune_(*eager.args())[0])
    assert torch.equal(compiled.weights[0], eager.weights[0])
    assert torch.equal(compiled.masks[0], eager.masks[0])

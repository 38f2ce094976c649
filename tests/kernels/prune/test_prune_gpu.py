"""What a step can get wrong on a CUDA device only: streams, graphs, memory, waiting, other devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from on_device import DEVICE, implementation
from torch import Tensor
from ugly import sample_inputs, to_cost

from drive.experiments.bench.workload import Case, Inputs, prove, vgg16_shapes
from drive.fused import PruneOp, PruneOps, prune_step
from drive.masks import Masks
from drive.result import PruneResult
from drive.targets.costs import Budget
from drive_kernels.prune.cost import reference as cost_reference
from drive_kernels.prune.op import reference

GIB = 1 << 30
BUDGET = Budget({"0": 3, "1": 1000, "2": 7}, 8_000_000, 0.5)  # of a Model's tensors, which cost 19 M at first
pytestmark = pytest.mark.gpu


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


def step(
    ops: PruneOps, goal: float | Budget, weights: list[Tensor], grads: list[Tensor], masks: Masks | None
) -> PruneResult:
    return prune_step(
        ops, "test", weights, grads, None,
        goal=goal, masks=masks, min_keep=0, include=None, exclude=None, layers=None, check_finite=False,
    )  # fmt: skip


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

    def step(self, ops: PruneOps, goal: float | Budget) -> PruneResult:
        result = step(ops, goal, self.weights, self.grads, self.masks)
        self.masks = result.masks
        return result

    def expect(self, grads: list[Tensor], goal: float | Budget) -> None:
        """The same step on the CPU."""
        ops = PruneOps(reference, cost_reference)
        self.expected_masks = step(ops, goal, self.expected, grads, self.expected_masks).masks

    def check(self) -> None:
        for ours, expected in zip(self.weights, self.expected, strict=True):
            assert torch.equal(ours.cpu(), expected)
        for ours, expected in zip(self.masks.values(), self.expected_masks.values(), strict=True):
            assert torch.equal(ours.cpu(), expected)


def warm_up(ops: PruneOps) -> None:
    """Kernels are compiled and loaded at their first launch, which may wait for the device."""
    model = Model(0)
    model.load(model.new_grads())
    for goal in (0.1, BUDGET):
        model.step(ops, goal)
    torch.cuda.synchronize()


@pytest.mark.parametrize("goal", (0.6, BUDGET), ids=("sparsity", "budget"))
@pytest.mark.parametrize("fresh", (True, False))
def test_graph_replay(ops: PruneOps, fresh: bool, goal: float | Budget):
    """One capture serves changed gradients; steps between the replays must not disturb what it holds."""
    warm_up(ops)
    model = Model(1)
    if not fresh:
        model.masks = Masks(
            {str(i): torch.ones_like(w, dtype=torch.bool) for i, w in enumerate(model.weights)}
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model.step(ops, goal)
    for seed in (2, 3):
        other = Model(seed, entries=30_000)
        other.load(other.new_grads())
        other.step(ops, 0.5)
        grads = model.new_grads()
        model.load(grads)
        for weight, mask in zip(model.weights, model.masks.values(), strict=True):
            weight.fill_(1)
            mask.fill_(True)
        model.expected = [torch.ones(w.shape) for w in model.weights]
        model.expected_masks = None
        graph.replay()
        model.expect(grads, goal)
        model.check()
        assert result.ok and (goal is BUDGET or result.pruned == round(0.6 * result.total))


def test_side_streams(ops: PruneOps):
    """A queue of steps on two streams that are kept waiting: each sees the inputs made on its own stream."""
    warm_up(ops)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    models = [Model(seed, entries) for seed, entries in enumerate((3_000_000, 90_000, 1_000_000, 300_000))]
    plan = [(model, model.new_grads(), goal) for goal in (0.2, 0.5, BUDGET, 0.9) for model in models]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(300_000_000)
    for model, grads, goal in plan:
        with torch.cuda.stream(streams[models.index(model) % 2]):
            model.load(grads)
            model.step(ops, goal)
    for model, grads, goal in plan:
        model.expect(grads, goal)
    torch.cuda.synchronize()
    for model in models:
        model.check()


@pytest.mark.parametrize("goal", (0.5, BUDGET), ids=("sparsity", "budget"))
def test_never_waits_for_the_device(ops: PruneOps, goal: float | Budget):
    warm_up(ops)
    model = Model(4)
    grads = model.new_grads()
    model.load(grads)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        slept = torch.cuda.Event()
        torch.cuda._sleep(2_000_000_000)  # about a second
        slept.record()
        model.step(ops, goal)
        assert not slept.query(), "the call came back while the device was still asleep"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    model.expect(grads, goal)
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
    ops: PruneOps, little_memory: Callable[[], None], old_masks: bool, free: int
):
    """Wherever in the step memory ends, it raises before anything is written, or it does all its work."""
    warm_up(ops)
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
        ops.prune(*inputs.arguments(case))
        failed = False
    except torch.OutOfMemoryError:
        failed = True
    del taken
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert failed or free, "the scratch of a step fits into no memory"
    if failed:
        assert all(map(torch.equal, (inputs.weight, inputs.mask, inputs.grad), before))
    prove(inputs, case, ops.prune)


@pytest.mark.parametrize(("name", "bytes_an_entry"), (("compiled", 1 / 4), ("triton", 3 / 8)))
def test_scratch_is_small(name: str, bytes_an_entry: float):
    """At most this, and 4 MiB."""
    prune_ = implementation(name)
    inputs = Inputs(vgg16_shapes(), torch.float32, DEVICE)
    for case in (Case("138M", torch.float32, 0.9, old_masks) for old_masks in (False, True)):
        inputs.begin(case)
        inputs.run(prune_, case)
        inputs.fresh()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        prune_(*inputs.arguments(case))
        extra = (torch.cuda.max_memory_allocated() - before) / inputs.entries
        assert extra <= bytes_an_entry + (4 << 20) / inputs.entries, f"{extra:.3f} bytes an entry"


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
    step = sample_inputs()[index].to(DEVICE)
    torch.library.opcheck(implementation("compiled"), step.args())
    costly = to_cost(step, range(5, 5 + len(step.weights)), 0.5, 0.3)
    torch.library.opcheck(implementation("compiled", "prune_to_cost_"), costly.args())


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

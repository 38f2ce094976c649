"""When forward and backward become a CUDA graph, what it is fed, and why not: with a stand-in for the graph.

What a real graph does is in test_capture_gpu.py.
"""

from __future__ import annotations

import ctypes
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from drive._scoring import capture
from drive._scoring.capture import WARM_UP, WORTHWHILE, GraphedGradients, captured
from drive._scoring.gradients import LossGradients
from drive._scoring.loss import Loss
from drive.methods import Problem

LOSS = nn.functional.cross_entropy


class FakeGraph:
    """Replays what was computed while it was recording: from the same inputs, into the same outputs."""

    recording: FakeGraph | None = None

    def __init__(self):
        self.inputs = self.outputs = self.compute = None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for name, grad in self.compute(self.inputs).items():
            self.outputs[name].copy_(grad)

    def reset(self) -> None:
        self.compute = None


class Recordable(LossGradients):
    """Eager gradients that a FakeGraph records; as in a real capture, the outputs hold nothing yet."""

    calls = 0

    def __call__(self, batch):
        graph = FakeGraph.recording
        if graph is None:
            self.calls += 1
        found = super().__call__(batch)
        if graph is not None:
            graph.inputs, graph.compute = batch, super().__call__
            graph.outputs = found = {name: torch.full_like(g, torch.nan) for name, g in found.items()}
        return found


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs a device, by stand-ins."""

    @contextmanager
    def recording(graph: FakeGraph, **_: object) -> Iterator[None]:
        FakeGraph.recording = graph
        try:
            yield
        finally:
            FakeGraph.recording = None

    @contextmanager
    def no_sync_warnings() -> Iterator[list]:
        yield []

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(capture, "_sync_warnings", no_sync_warnings)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(count: int, size: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def graphed(model: nn.Module | None = None, loss=LOSS, required: bool = False) -> GraphedGradients:
    model = model or network()
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    return GraphedGradients(Recordable(model, weights, Loss(loss)), None, required)


def run(gradients: GraphedGradients, data) -> list[dict[str, Tensor]]:
    return [{name: grad.clone() for name, grad in gradients(batch).items()} for batch in data]


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_replays_on_every_new_batch():
    data = batches(8)
    model, twin = network(), network()
    gradients = graphed(model)
    found = run(gradients, data)
    assert_same(found, run(graphed(twin)._eager, data))
    assert gradients._eager.calls == WARM_UP and gradients._graph.replays == 8 - WARM_UP
    assert gradients.reason is None
    assert model[1].num_batches_tracked > 0
    graph = gradients._graph
    gradients.release()
    assert graph.compute is None and not gradients._grads and not gradients.overwrites


@pytest.mark.parametrize("bad", (0, WARM_UP - 1, WARM_UP, WARM_UP + 2))
def test_losses_are_added_up_in_one_place(bad: int):
    """Which a graph writes to whenever it is replayed."""
    data = batches(8)
    data[bad] = data[bad][0], torch.full_like(data[bad][1], -100)
    gradients, places = graphed(), set()
    loss = gradients._eager.loss
    for number, batch in enumerate(data):
        gradients(batch)
        places.add(loss.total.data_ptr())
        assert bool(loss.total.isfinite()) == (number < bad)
    assert gradients._graph.replays == 8 - WARM_UP and len(places) == 1
    with pytest.raises(ValueError, match="^x: the loss must be finite, got nan"):
        loss.check_finite("x")


def test_other_shapes_are_eager():
    """A smaller batch at the end of each epoch of two."""
    full, rest = batches(8), batches(4, size=3, seed=2)
    data = [batch for i in range(4) for batch in (*full[2 * i : 2 * i + 2], rest[i])]
    gradients = graphed()
    assert_same(run(gradients, data), run(graphed()._eager, data))
    assert gradients._graph.replays == 8 - WARM_UP
    assert gradients._eager.calls == WARM_UP + 4


def test_dtype_strides_and_structure_are_part_of_the_shape():
    gradients = graphed(loss=lambda y, t: LOSS(y, t["labels"].long()))
    data = [(x, {"labels": y}) for x, y in batches(5)]
    run(gradients, data)
    assert gradients._graph.replays == 2
    inputs, targets = data[0]
    run(gradients, [(inputs.T.contiguous().T, targets), (inputs, {"labels": targets["labels"].int()})])
    run(gradients, [(inputs, {"labels": targets["labels"], "more": inputs})])
    assert gradients._graph.replays == 2 and gradients._eager.calls == WARM_UP + 3


def problem(gradients: GraphedGradients, data) -> Problem:
    eager = gradients._eager
    return Problem(
        eager.model, eager.weights, iter(data), eager.loss, gradients,
        train=print, accumulate=1, sparsity=0.5, iteration=1, iterations=1,
    )  # fmt: skip


def test_gradients_are_the_callers_own_unless_reused():
    """A method may sum gradients of several batches."""
    data = batches(8)
    ours = problem(graphed(), data)
    kept = [ours.loss_gradients() for _ in data]
    assert_same(kept, run(graphed()._eager, data))
    reusing = problem(graphed(), data)
    kept = [reusing.loss_gradients(reuse=True) for _ in data]
    assert kept[-1]["0.weight"] is kept[-2]["0.weight"] and kept[-1] is not kept[-2]


class Nothing:
    device = torch.device("cpu")

    def __call__(self, batch):
        return {}


@pytest.mark.parametrize(
    ("batch", "misfit"),
    (
        ((torch.zeros(4, 6), 3), "a int"),
        ((torch.zeros(4, 6), [None]), "a NoneType"),
        ((torch.zeros(4, 6, device="meta"), torch.zeros(4)), "a tensor on meta"),
        ((torch.zeros(4, 6).to_sparse(), torch.zeros(4)), "a tensor of layout torch.sparse_coo"),
        ((torch.zeros(4, 6, requires_grad=True), torch.zeros(4)), "a tensor that requires a gradient"),
        ((pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), torch.zeros(4)), "a NoneType"),
    ),
)
def test_batches_that_a_graph_cannot_take(batch, misfit: str, caplog: pytest.LogCaptureFixture):
    gradients = GraphedGradients(Nothing(), None, required=False)
    assert gradients(batch) == {} and gradients(batch) == {}
    assert gradients.reason.startswith(f"a batch holds {misfit}")
    assert [r.levelno for r in caplog.records] == [logging.WARNING], "said once"
    with pytest.raises(RuntimeError, match=f"not captured as a CUDA graph: a batch holds {misfit}"):
        graphed(required=True)(batch)


class Skips(nn.Sequential):
    """Leaves out a layer at random, by numbers drawn on the CPU."""

    def __init__(self, draw):
        super().__init__(*network())
        self.draw = draw

    def forward(self, x):
        return super().forward(x) * (1 if self.draw() < 2 else 0)


class Replaces(nn.Sequential):
    def __init__(self):
        super().__init__(*network())
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return super().forward(x - self.mean)


@pytest.mark.parametrize(
    ("model", "reason"),
    (
        (lambda: Skips(lambda: torch.rand(())), "random numbers on the CPU"),
        (lambda: Skips(random.random), "random numbers on the CPU"),
        (Replaces, "a new tensor in the place of its buffer mean"),
    ),
)
def test_what_a_graph_would_not_repeat(model, reason: str, caplog: pytest.LogCaptureFixture):
    data = batches(6)
    gradients = graphed(model())
    assert_same(run(gradients, data), run(graphed(model())._eager, data))
    assert reason in gradients.reason and gradients._graph is None
    assert [r.message for r in caplog.records] == [capture._message(gradients.reason)]
    required = graphed(model(), required=True)
    with pytest.raises(RuntimeError, match=reason):
        run(required, data)


def test_waiting_for_the_device_is_seen(monkeypatch: pytest.MonkeyPatch):
    @contextmanager
    def one_wait() -> Iterator[list]:
        yield [SimpleNamespace(filename="f.py", lineno=7, message=f"{capture._WAITS} (triggered internally)")]

    monkeypatch.setattr(capture, "_sync_warnings", one_wait)
    gradients = graphed()
    run(gradients, batches(5))
    assert gradients.reason == "the model or the loss waits for the device (.item(), say) at f.py:7"


@pytest.mark.parametrize("can_be_ended", (False, True))
@pytest.mark.parametrize("at", ("inside", "at the end"))
def test_capture_that_fails(
    at: str, can_be_ended: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    class Delicate(nn.Sequential):
        def forward(self, x):
            if FakeGraph.recording and at == "inside":
                raise torch.OutOfMemoryError("out of memory\nand much more")
            return super().forward(x)

    @contextmanager
    def recording(graph: FakeGraph, **_: object) -> Iterator[None]:
        FakeGraph.recording = graph
        yield
        FakeGraph.recording = None
        raise RuntimeError("capture ended badly\n")

    monkeypatch.setattr(torch.cuda, "graph", recording)
    ended: list[tuple[object, object]] = []
    monkeypatch.setattr(capture, "CAN_BE_ENDED", can_be_ended)
    monkeypatch.setattr(capture, "_end", lambda graph, stream: ended.append((graph, stream)))
    data = batches(7)
    gradients = graphed(Delicate(*network()))
    assert_same(run(gradients, data), run(graphed()._eager, data))
    expected = "out of memory" if at == "inside" else "capture ended badly"
    assert len(ended) == can_be_ended and all(isinstance(graph, FakeGraph) for graph, _ in ended)
    assert gradients.reason == f"capturing failed: {expected}", "what went wrong first"
    assert gradients._graph is None and not gradients._inputs and not gradients._grads
    assert len(caplog.records) == 1
    with pytest.raises(RuntimeError, match=expected) as error:
        run(graphed(Delicate(*network()), required=True), data)
    assert expected in str(error.value.__cause__)


@pytest.mark.parametrize("fault", (None, "library", "begin", "end"))
def test_before_2_12_an_empty_capture_ends_what_was_lost(fault: str | None, monkeypatch: pytest.MonkeyPatch):
    calls: list[object] = []

    class Driver:
        def __init__(self, name: str):
            calls.append(name)
            if fault == "library":
                raise OSError("no such file")

        def cuStreamBeginCapture_v2(stream: int, mode: int) -> int:
            calls.append((stream, mode))
            return 401 if fault == "begin" else 0

        cuStreamBeginCapture_v2.argtypes = None

    class Graph:
        def capture_end(self) -> None:
            calls.append("end")
            warnings.warn("The CUDA Graph is empty. This usually means", stacklevel=1)
            if fault == "end":
                raise RuntimeError("capture_end() called before capture_begin()")

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(name) and Driver)
    stream = SimpleNamespace(cuda_stream=1234)
    if fault is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            capture._end(Graph(), stream)
        assert calls == ["libcuda.so.1", (1234, 2), "end"]
    else:
        with pytest.raises(
            RuntimeError, match=r"cannot go on after it; 2\.13 or later can, and capture=False"
        ):
            capture._end(Graph(), stream)


def test_never_captured():
    gradients = graphed(required=True)
    run(gradients, [batch for size in (2, 3, 4) for batch in batches(3, size)])
    with pytest.raises(RuntimeError, match="it takes more than 3 batches of one shape"):
        gradients.finish()


def test_a_loss_without_a_weight_is_the_users_error():
    gradients = graphed(loss=lambda y, t: torch.zeros((), requires_grad=True) * 1)
    with pytest.raises(ValueError, match="0.weight has no gradient"):
        run(gradients, batches(1))


def stand_in(device: str, model: nn.Module | None = None) -> LossGradients:
    return SimpleNamespace(device=torch.device(device), model=model or nn.ReLU())


@pytest.mark.parametrize(
    ("eager", "iterations", "recovers", "reason"),
    (
        (stand_in("cpu"), 100, True, "the weights are on cpu"),
        (stand_in("cuda:0", nn.BatchNorm1d(3)), 100, True, "on several devices: cuda:0, cpu"),
        (stand_in("cuda:0"), WORTHWHILE - 1, True, "it pays from 20 iterations on, there are 19"),
        (stand_in("cuda:0"), 100, False, "PyTorch 2.12 cannot go on after a capture that fails"),
    ),
)
def test_not_even_tried(
    eager, iterations, recovers, reason, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(capture, "RECOVERS", recovers)
    monkeypatch.setattr(capture, "CAN_BE_ENDED", False)
    with caplog.at_level(logging.INFO), captured(eager, "auto", iterations) as gradients:
        assert gradients is eager
    assert reason in caplog.text and caplog.records[0].levelno == logging.INFO
    caplog.clear()
    with captured(eager, False, iterations) as gradients:
        assert gradients is eager
    assert not caplog.records, "nothing to explain"
    if "device" in reason or "cpu" in reason:
        with pytest.raises(RuntimeError, match=reason), captured(eager, True, iterations):
            pass

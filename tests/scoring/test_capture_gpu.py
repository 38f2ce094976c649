"""drive.prune on a CUDA device: a captured run is an eager run, and a capture that fails leaves no trace."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import drive
from drive import Masks, methods
from drive._scoring.capture import CAN_BE_ENDED, RECOVERS, WARM_UP, WORTHWHILE, Capture

DEVICE = "cuda"
LOSS = nn.functional.cross_entropy
pytestmark = pytest.mark.gpu
needs_an_end = pytest.mark.skipif(
    not RECOVERS and not CAN_BE_ENDED, reason="PyTorch 2.12 cannot go on after a capture that fails"
)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The graphs that were replayed, once for every time."""
    seen = []

    class Counted(torch.cuda.CUDAGraph):
        def replay(self) -> None:
            seen.append(self)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    return seen


def mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10)]
    return nn.Sequential(*layers).to(DEVICE)


def cnn(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    ]  # fmt: skip
    return nn.Sequential(*layers).to(DEVICE)


def batches(
    count: int = 5, size: int = 16, device: str = "cpu", seed: int = 1
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]
    if device == "pinned":
        return [(x.pin_memory(), y.pin_memory()) for x, y in made]
    return [(x.to(device), y.to(device)) for x, y in made]


def prune(model: nn.Module, data=None, loss=LOSS, **options) -> Masks:
    defaults = {"sparsity": 0.95, "iterations": WORTHWHILE, "progress": False}
    return drive.prune(model, batches() if data is None else data, loss, **{**defaults, **options})


def assert_same(ours: nn.Module, theirs: nn.Module, our_masks: Masks, their_masks: Masks) -> None:
    assert our_masks.keys() == their_masks.keys()
    assert all(torch.equal(our_masks[name], their_masks[name]) for name in our_masks)
    theirs_state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs_state[name]), name


def assert_captures(model: nn.Module, data=None, loss=LOSS, **options) -> None:
    """Captured and eager runs of the model are the same, to the bit."""
    twin = copy.deepcopy(model)
    ours = prune(model, data, loss, capture=True, **options)
    assert_same(model, twin, ours, prune(twin, data, loss, capture=False, **options))


def assert_usable() -> None:
    """Nothing of a capture is left: streams, RNG, debug mode, and another one can begin."""
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert nn.functional.dropout(torch.ones(1000, device=DEVICE)).count_nonzero().item() > 0
    assert_captures(cnn(dropout=0.3))


@pytest.mark.parametrize("where", ("cpu", "pinned", DEVICE))
@pytest.mark.parametrize("autocast", (None, torch.bfloat16))
@pytest.mark.parametrize("make", (mlp, cnn))
def test_captured_is_eager(make, autocast: torch.dtype | None, where: str, replays: list):
    assert_captures(make(dropout=0.3), batches(device=where), autocast=autocast, iterations=30)
    assert len(replays) == 30 - WARM_UP and len(set(map(id, replays))) == 1


def test_auto_as_users_get_it(replays: list, caplog: pytest.LogCaptureFixture):
    """With any PyTorch: the results of eager calls, and a graph, or the reason why there is none."""
    model, twin = cnn(dropout=0.3), cnn(dropout=0.3)
    with caplog.at_level(logging.INFO, logger="drive.capture"):
        ours = prune(model, iterations=WORTHWHILE, capture="auto")
    assert_same(model, twin, ours, prune(twin, iterations=WORTHWHILE, capture=False))
    said = [record.getMessage() for record in caplog.records]
    assert bool(replays) != any("not captured as a CUDA graph" in words for words in said), said


def test_channels_last(replays: list):
    assert_captures(cnn().to(memory_format=torch.channels_last))
    assert replays


@needs_an_end
def test_auto_captures_when_it_pays(replays: list, caplog: pytest.LogCaptureFixture):
    prune(cnn())
    assert len(replays) == WORTHWHILE - WARM_UP and not caplog.records
    replays.clear()
    prune(cnn(), iterations=WORTHWHILE - 1)
    prune(cnn(), method="snip", iterations=1)
    prune(cnn(), method="magnitude", iterations=1)
    prune(cnn(), capture=False)
    assert not replays and not caplog.records


def test_uneven_last_batch(replays: list):
    data = [*batches(3), batches(1, size=5, seed=2)[0]]
    assert_captures(cnn(dropout=0.3), data)
    assert len(replays) == WORTHWHILE * 3 // 4 - WARM_UP


def test_nested_batches(replays: list):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = cnn()

        def forward(self, inputs):
            return self.layers(inputs["images"] + inputs["more"][0])

    data = [({"images": x, "more": (x,)}, [y]) for x, y in batches()]
    assert_captures(Nested(), data, lambda outputs, targets: LOSS(outputs, targets[0]))
    assert replays


def test_data_loader_with_threads(replays: list):
    """Workers and a thread that pins memory, at work while a capture is under way."""
    images, labels = (torch.cat(parts) for parts in zip(*batches(20), strict=True))

    def loader() -> DataLoader:
        return DataLoader(TensorDataset(images, labels), 16, num_workers=2, pin_memory=True)

    model, twin = cnn(), cnn()
    ours = prune(model, loader(), capture=True)
    assert_same(model, twin, ours, prune(twin, loader(), capture=False))
    assert replays


def test_takes_no_batch_too_many():
    data = iter(batches(WORTHWHILE + 3))
    prune(cnn(), data, capture=True)
    assert len(list(data)) == 3


class Remember(methods.Drive):
    """DRIVE; keeps the gradients of every iteration."""

    def __init__(self):
        super().__init__()
        self.seen: list[Tensor] = []

    def rank(self, problem):
        found = problem.loss_gradients()
        self.seen.append(found["4.weight"])
        return methods.Ranking(found)


def test_dropout_differs_from_replay_to_replay():
    def gradients(capture: bool, seed: int) -> list[Tensor]:
        method = Remember()
        options = {"sparsity": 0.0, "schedule": lambda n: 0.0, "iterations": 8, "seed": seed}
        prune(mlp(dropout=0.5), batches(1), method=method, capture=capture, **options)
        return method.seen

    captured = gradients(True, seed=3)
    for i, one in enumerate(captured):  # same batch, same weights
        assert not any(torch.equal(one, other) for other in captured[:i])
    assert all(map(torch.equal, captured, gradients(True, seed=3)))
    assert all(map(torch.equal, captured, gradients(False, seed=3)))
    assert not torch.equal(captured[-1], gradients(True, seed=4)[-1])


def test_a_method_that_adds_up_batches(replays: list):
    class Sum(methods.Drive):
        def rank(self, problem):
            one, two = problem.loss_gradients(), problem.loss_gradients()
            return methods.Ranking({name: one[name] + two[name] for name in one})

    assert_captures(cnn(), method=Sum())
    assert replays


def test_everything_else_is_as_before():
    model = cnn(dropout=0.3)
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 7)
    before = copy.deepcopy(model.state_dict())
    rng, cuda_rng = torch.get_rng_state(), torch.cuda.get_rng_state()
    masks = prune(model, capture=True)
    for name, tensor in model.state_dict().items():
        expected = before[name].masked_fill(~masks[name], 0) if name in masks else before[name]
        assert torch.equal(tensor, expected), name
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(torch.cuda.get_rng_state(), cuda_rng)
    assert not model[4].weight.requires_grad and model[4].weight.grad is None
    assert (model[0].weight.grad == 7).all()


def test_memory_is_given_back():
    prune(cnn(), capture=True)  # workspaces stay
    gc.collect()
    torch.cuda.empty_cache()
    model = cnn()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    masks = prune(model, capture=True)
    del masks
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == allocated
    assert torch.cuda.memory_reserved() <= reserved + (2 << 20)


@needs_an_end
@pytest.mark.parametrize("capture", (True, "auto") if RECOVERS else ("auto",))
def test_a_loss_that_someone_still_holds(capture: Capture):
    """As after a warm-up in a notebook: its autograd graph keeps the leaves on the default stream, with which
    PyTorch before 2.13 cannot capture."""
    model = cnn()
    inputs, targets = batches(1, device=DEVICE)[0]
    loss = LOSS(model(inputs), targets)
    loss.backward()
    twin = copy.deepcopy(model)
    ours = prune(model, capture=capture)
    assert_same(model, twin, ours, prune(twin, capture=False))
    assert loss.grad_fn is not None
    assert_usable()


class Waits(nn.Sequential):
    """Reads a number back in every forward pass."""

    def forward(self, x):
        y = super().forward(x)
        return y if y.abs().max().item() < 1e6 else y * 0


class FailsToCapture(nn.Sequential):
    """Does what a capture cannot do, but only then, so that no eager call shows it."""

    def __init__(self, *layers, by: str):
        super().__init__(*layers)
        self.by = by

    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            if self.by == "waiting":
                torch.cuda.synchronize()
            elif self.by == "taking all memory":
                torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)
            else:
                raise RuntimeError("not in a graph")
        return super().forward(x)


def assert_falls_back(model: nn.Module, reason: str, replays: list, caplog: pytest.LogCaptureFixture) -> None:
    """Asked to, it raises and restores; by itself it goes on eagerly, and says why once."""
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=f"not captured as a CUDA graph: .*{reason}"):
        prune(model, capture=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    caplog.clear()
    ours = prune(model, capture="auto")
    assert not replays
    assert len(caplog.records) == 1 and "not captured as a CUDA graph" in caplog.text
    assert_same(model, twin, ours, prune(twin, capture=False))
    assert_usable()


@needs_an_end
def test_model_that_waits_for_the_device(replays: list, caplog: pytest.LogCaptureFixture):
    assert_falls_back(
        Waits(*cnn(dropout=0.3)), r"waits for the device .*test_capture_gpu\.py", replays, caplog
    )


@needs_an_end
@pytest.mark.parametrize("by", ("waiting", "taking all memory", "raising"))
def test_capture_that_fails(by: str, replays: list, caplog: pytest.LogCaptureFixture):
    assert_falls_back(FailsToCapture(*cnn(dropout=0.3), by=by), "capturing failed: ", replays, caplog)


@pytest.mark.parametrize("error", (KeyboardInterrupt(), ValueError("no")))
def test_interrupted_in_a_captured_run(error: BaseException):
    def interrupted() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(12)
        raise error

    model = cnn()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(type(error)):
        prune(model, interrupted(), capture=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert_usable()


@pytest.mark.parametrize("bad", (1, 2, 7, WORTHWHILE))
@pytest.mark.parametrize("capture", (False, True))
def test_non_finite_loss(capture: bool, bad: int):
    data = batches(WORTHWHILE)
    data[bad - 1] = (data[bad - 1][0] * torch.nan, data[bad - 1][1])
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    message = f"prune: iteration {bad}: the loss must be finite, got nan"
    with pytest.raises(ValueError, match=message):
        prune(model, data, capture=capture)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_loop_waits_for_no_step_but_the_last():
    """Nothing that PyTorch counts as waiting for the device; the checks wait for events, a step late."""
    data = batches(device="pinned")
    prune(cnn(), data, capture=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prune(cnn().train(), data, capture=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")

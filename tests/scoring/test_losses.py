"""The three forms of batches, and everything else, of which drive.prune says what it should be."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import drive
from drive import Masks, PruneResult
from drive._scoring.feed import mover
from drive.methods import Crop, Grasp

LOSS = nn.functional.cross_entropy
METHODS = ("drive", "snip", "crop", "rigl", "imp", "gradual")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def pairs(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 12, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(count)
    ]


class Client(nn.Module):
    """A model that computes its own loss, and returns it in a way of its own."""

    def __init__(self, answer: Callable[[Tensor], Any]):
        super().__init__()
        self.net, self.answer = network(), answer

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        return self.answer(torch.tensor(0.0) if labels is None else LOSS(self.net(pixels), labels))


class Output:
    def __init__(self, loss: Tensor | None):
        self.loss = loss


ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "attribute": Output,
    "key": lambda loss: {"loss": loss, "logits": torch.ones(3)},
    "dict of losses": lambda loss: {"boxes": loss * 0.25, "classes": loss * 0.75},
    "itself": lambda loss: loss,
}


def run(model: nn.Module, batches: Any, loss_fn: Any = None, **options: Any) -> Masks:
    options = {"sparsity": 0.8, "iterations": 3, "progress": False, **options}
    return drive.prune(model, batches, loss_fn, **options)


def assert_same(found: Masks, expected: Masks) -> None:
    assert [name.removeprefix("net.") for name in found] == list(expected)
    assert all(map(torch.equal, found.values(), expected.values()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_mappings(answer: str, method: str):
    expected = run(network(), pairs(), LOSS, method=method)
    batches = [{"pixels": x, "labels": y} for x, y in pairs()]
    kind = dict if answer == "key" else UserDict  # as transformers' BatchEncoding
    assert_same(run(Client(ANSWERS[answer]), list(map(kind, batches)), method=method), expected)


@pytest.mark.parametrize("method", METHODS)
def test_compute_loss(method: str):
    expected = run(network(), pairs(), LOSS, method=method)

    def compute_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return LOSS(model(batch["x"][0]), batch["y"])

    batches = [{"x": [x], "y": y, "name": "any"} for x, y in pairs()]
    assert_same(run(network(), batches, compute_loss=compute_loss, method=method), expected)


def test_what_is_passed_to_compute_loss_is_what_came():
    class Graph:
        """As PyTorch Geometric's: moves itself, in place."""

        def __init__(self, x: Tensor, y: Tensor):
            self.x, self.y, self.moved = x, y, 0

        def to(self, device: torch.device) -> Graph:
            self.moved += 1
            return self

    graphs = [Graph(x, y) for x, y in pairs()]
    seen: list[Graph] = []

    def compute_loss(model: nn.Module, graph: Graph) -> Tensor:
        seen.append(graph)
        return LOSS(model(graph.x), graph.y)

    assert_same(run(network(), graphs, compute_loss=compute_loss), run(network(), pairs(), LOSS))
    assert [graph.moved for graph in seen] == [1, 1, 1], "to the device"
    assert not any(graph.moved for graph in graphs), "a copy: the data stay where they are"


def test_nested_batches_are_moved():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = mover(torch.device("meta"))(
        ({"a": [torch.ones(2)], "b": UserDict(c=torch.ones(1))}, packed, "text")
    )
    inputs, sequence, text = moved
    assert inputs["a"][0].is_meta and inputs["b"]["c"].is_meta and text == "text"
    assert isinstance(inputs["b"], UserDict), "what a model takes has the type that it came with"
    assert isinstance(sequence, PackedSequence) and sequence.data.is_meta and not sequence.batch_sizes.is_meta
    assert not packed.data.is_meta


def test_lists_of_two_are_pairs():
    assert_same(run(network(), [list(pair) for pair in pairs()], LOSS), run(network(), pairs(), LOSS))


X, Y = pairs(1)[0]
FORMS = (
    r"must be \(inputs, targets\), with loss_fn.*a mapping.*model\(\*\*batch\).*compute_loss\(model, batch\)"
)
WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "tensor": (X, {"loss_fn": LOSS}, TypeError, FORMS + r"; got a tensor of shape \(8, 12\), and loss_fn"),
    "triple": ((X, Y, 1), {"loss_fn": LOSS}, TypeError, r"; got a tuple of 3 \(Tensor, Tensor, int\)"),
    "mapping": ({"x": X}, {"loss_fn": LOSS}, TypeError, "; got a dict of x, and loss_fn"),
    "object": (slice(1), {"loss_fn": LOSS}, TypeError, "; got a slice, and loss_fn"),
    "pair alone": ((X, Y), {}, TypeError, r"; got a tuple of 2 \(Tensor, Tensor\), and neither of the two"),
    "both": ((X, Y), {"loss_fn": LOSS, "compute_loss": LOSS}, ValueError, "loss_fn must be None where"),
    "no function": ((X, Y), {"loss_fn": "mse"}, TypeError, "loss_fn must be callable, got str"),
    "no function either": ((X, Y), {"compute_loss": 3}, TypeError, "compute_loss must be callable, got int"),
    "not scalar": (
        (X, Y), {"loss_fn": lambda y, t: y}, TypeError, r"scalar tensor, got a tensor of shape \(8, 4\)",
    ),
    "a number": ((X, Y), {"compute_loss": lambda m, b: 1.5}, TypeError, "a scalar tensor, got a float"),
    "detached": (
        (X, Y), {"compute_loss": lambda m, b: LOSS(m(b[0]), b[1]).detach()}, ValueError,
        "the loss must depend on the weights, got one without a gradient: is it detached",
    ),
    "no callable": ((X, Y), {"loss_fn": LOSS, "on_step": 3}, TypeError, "on_step must be callable, got int"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("method", ("drive", "crop", "gradual"))
def test_everything_else_is_an_error_in_words(case: str, method: str):
    batch, options, error, words = WRONG[case]
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        run(model, [batch], method=method, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("answer", "words"),
    (
        (
            lambda loss: Output(None),
            r"must return its loss .*, got a Output: are there labels in the batch\?",
        ),
        (lambda loss: {"logits": torch.ones(3, 4)}, "got a dict of logits: are there labels"),
        (
            lambda loss: {"loss": None, "logits": torch.ones(3, 4)},
            "got a dict of loss, logits: are there labels",
        ),
        (lambda loss: (loss, torch.ones(3)), r"got a tuple of 2 \(Tensor, Tensor\): are there labels"),
        (
            lambda loss: torch.stack([loss, loss]),
            r"the loss must be a scalar tensor, got a tensor of shape \(2,\)",
        ),
    ),
)
def test_models_without_a_loss(answer, words: str):
    with pytest.raises((ValueError, TypeError), match=words):
        run(Client(answer), [{"pixels": X, "labels": Y}])


def test_data_free_methods_need_no_loss():
    run(network(), [], method="magnitude", iterations=1)
    drive.prune(network(), [], method="random", sparsity=0.5, progress=False)


def test_temperature_is_never_ignored():
    batches = [{"pixels": x, "labels": y} for x, y in pairs()]
    calls: list[int] = []

    def compute_loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return LOSS(model(batch[0]), batch[1])

    with pytest.raises(
        ValueError, match="temperature must be 1 with the model's own loss.*got 200.*temperature=1"
    ):
        run(Client(Output), batches, method="grasp")
    with pytest.raises(ValueError, match="temperature must be 1 with compute_loss"):
        run(network(), pairs(), compute_loss=compute_loss, method="grasp")
    assert not calls, "before anything is computed"
    expected = run(network(), pairs(), LOSS, method=Grasp(temperature=1))
    assert_same(run(Client(Output), batches, method=Grasp(temperature=1)), expected)
    assert_same(run(network(), pairs(), compute_loss=compute_loss, method=Grasp(temperature=1)), expected)


@pytest.mark.parametrize("wrap", (Output, lambda y: UserDict(loss=y)))
def test_outputs_that_no_temperature_divides(wrap):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.net(x))

    def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
        return LOSS(outputs["loss"] if isinstance(outputs, UserDict) else outputs.loss, targets)

    with pytest.raises(TypeError, match=r"to be divided by the temperature 200, got a .*temperature=1"):
        run(Wrapped(), pairs(), loss_fn, method="grasp")
    expected = run(network(), pairs(), LOSS, method=Grasp(temperature=1))
    assert_same(run(Wrapped(), pairs(), loss_fn, method=Grasp(temperature=1)), expected)


@pytest.mark.parametrize("method", ("drive", "crop", "rigl"))
def test_on_step(method: str):
    model = network()
    seen: list[tuple[float, bool]] = []

    def on_step(result: PruneResult) -> None:
        zeros = all(not model.get_parameter(n)[~m].any() for n, m in result.masks.items())
        seen.append((result.sparsity, zeros))

    masks = run(model, pairs(), LOSS, method=method, on_step=on_step)
    assert len(seen) == 3 and all(zeros for _, zeros in seen)
    assert seen[-1][0] == pytest.approx(masks.sparsity())
    assert sorted(sparsity for sparsity, _ in seen) == [sparsity for sparsity, _ in seen]


def test_on_step_that_raises():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        run(model, pairs(), LOSS, on_step=lambda result: 1 / 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layer", (nn.Hardsigmoid(), nn.Hardswish(), nn.SiLU()))
@pytest.mark.parametrize("method", (Grasp(), Crop()))
def test_layers_without_a_second_derivative(layer: nn.Module, method: Any):
    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * nn.functional.hardsigmoid(x) if isinstance(layer, nn.Hardsigmoid) else layer(x)

    model = nn.Sequential(nn.Sequential(nn.Linear(12, 16), nn.Tanh()), Gated(), nn.Linear(16, 4))
    if not isinstance(layer, nn.Hardsigmoid):
        run(model, pairs(), LOSS, method=method, iterations=1)
        return
    words = f"{method.name}: the model must have a second derivative, got hardsigmoid without one in 1 .*take"
    with pytest.raises(ValueError, match=words):
        run(model, pairs(), LOSS, method=method, iterations=1)
    assert not any(module._forward_hooks for module in model.modules())


class Square(torch.autograd.Function):
    """PyTorch raises where a whole backward pass runs through it twice, not on the way to some tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2 * ctx.saved_tensors[0]


@pytest.mark.parametrize("method", ("grasp", "crop"))
def test_functions_that_differentiate_once(method: str):
    class Squared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x)

    model = nn.Sequential(nn.Linear(12, 16), nn.Sequential(nn.Tanh(), Squared()), nn.Linear(16, 4))
    words = f"{method}: .* got an operation without one in 1.1 .*once_differentiable.*: replace it"
    with pytest.raises(ValueError, match=words):
        run(model, pairs(), LOSS, method=method, iterations=1)
    run(model, pairs(), LOSS, method="drive")


@pytest.mark.parametrize("method", ("grasp", "crop"))
def test_second_derivatives_of_compiled_models(method: str):
    expected = run(network(), pairs(), LOSS, method=method)
    found = run(torch.compile(network(), backend="aot_eager"), pairs(), LOSS, method=method)
    assert_same(found, expected)


def test_operations_of_torchvision():
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")

    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pool, self.head = nn.Conv2d(3, 4, 3), nn.Identity(), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            boxes = torch.tensor([[0.0, 0, 0, 4, 4], [1, 0, 0, 3, 3]])
            return self.head(self.pool(ops.RoIAlign(2, 1.0, 2)(self.body(x), boxes)).flatten(1))

    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([0, 3]))]
    with pytest.raises(ValueError, match="got roi_align without one in pool"):
        run(Regions(), batches, LOSS, method="grasp", iterations=1)


@pytest.mark.parametrize("wrap", (dict, lambda **k: (k["a"], [k["b"]]), lambda **k: UserDict(k)))
def test_synflow_of_models_with_several_outputs(wrap):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Any:
            y = self.net(x)
            return wrap(a=y[:, :2], b=y[:, 2:])

    expected = drive.prune(network(), pairs(), method="synflow", sparsity=0.8, progress=False)
    found = drive.prune(Heads(), pairs(), method="synflow", sparsity=0.8, progress=False)
    assert_same(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_one_instance_serves_several_runs(method: str):
    """Also after one that failed, and one within another."""
    fresh = [run(network(), data, LOSS, method=method) for data in (pairs(4), pairs(5))]
    one = drive.methods.get(method)
    with pytest.raises(ZeroDivisionError):
        run(network(), pairs(4), LOSS, method=one, on_step=lambda result: 1 / 0)
    inner: list[Masks] = []

    def nested(result: PruneResult) -> None:
        if not inner:
            inner.append(run(network(), pairs(5), LOSS, method=one))

    assert_same(run(network(), pairs(4), LOSS, method=one, on_step=nested), fresh[0])
    assert_same(inner[0], fresh[1])

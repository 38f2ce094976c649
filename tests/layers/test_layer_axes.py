"""The registry's axes are those along which layers multiply: found out by changing an input or a weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import drive
from drive.layers import Weight, register_layer, registry, weights_of


def depends(run, weight: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Which inputs an entry of the weight meets, which outputs it reaches: [entries, inputs or outputs]."""

    def passes() -> tuple[Tensor, Tensor]:
        x = inputs.clone().requires_grad_()
        out = run(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        return gradient.flatten(0, -2), out.detach().flatten(0, -2)

    gradient, out = passes()
    met, reached = [], []
    flat = weight.detach().view(-1)
    for index in range(flat.numel()):
        before = flat[index].clone()
        flat[index] += 1
        changed = passes()
        flat[index] = before
        met.append(((changed[0] - gradient).abs() > 1e-4).any(0))
        reached.append(((changed[1] - out).abs() > 1e-4).any(0))
    return torch.stack(met), torch.stack(reached)


def channels_last(layer: nn.Module):
    """[B, positions, channels] in and out, of a convolution of one dimension."""
    return lambda x: layer(x.transpose(1, 2)).transpose(1, 2)


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)


LAYERS = {
    "Linear": lambda: (nn.Linear(6, 4), None),
    "Conv": lambda: ((c := nn.Conv1d(6, 4, 2)), channels_last(c)),
    "Conv in groups": lambda: ((c := nn.Conv1d(6, 4, 2, groups=2)), channels_last(c)),
    "ConvTranspose": lambda: ((c := nn.ConvTranspose1d(6, 4, 2)), channels_last(c)),
    "ConvTranspose in groups": lambda: ((c := nn.ConvTranspose1d(6, 4, 2, groups=2)), channels_last(c)),
    "Conv1D of transformers": lambda: (conv1d(), None),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_axes(layer: str):
    torch.manual_seed(0)
    module, run = LAYERS[layer]()
    weight, record = module.weight, weights_of(module)["weight"]
    met, reached = depends(run or module, weight, torch.randn(2, 5, 6))
    index = torch.stack(torch.meshgrid(*map(torch.arange, weight.shape), indexing="ij"), -1).flatten(0, -2)
    part = index[:, record.stacked] // (weight.shape[record.stacked] // record.parts)

    def whole(axis: int) -> Tensor:
        """The number of an input or output in the layer, not in its group."""
        here = index[:, axis]
        return here if axis == record.stacked else here + part * weight.shape[axis]

    assert torch.equal(reached.int().argmax(1), whole(record.outputs)) and (reached.sum(1) == 1).all()
    assert torch.equal(met.int().argmax(1), whole(record.inputs)) and (met.sum(1) == 1).all()


@pytest.mark.parametrize(("kind", "gates"), ((nn.RNN, 1), (nn.LSTM, 4), (nn.GRU, 3)))
def test_recurrent_layers(kind, gates: int):
    weights = weights_of(kind(5, 3, num_layers=2, bidirectional=True))
    assert len(weights) == 8 and all(weight.parts == gates for weight in weights.values())
    assert weights_of(nn.LSTM(5, 3, proj_size=2))["weight_hr_l0"].parts == 1
    assert set(weights_of(nn.LSTMCell(5, 3))) == {"weight_ih", "weight_hh"}


def test_attention():
    assert {key: w.parts for key, w in weights_of(nn.MultiheadAttention(4, 2)).items()} == {
        "in_proj_weight": 3
    }
    apart = weights_of(nn.MultiheadAttention(4, 2, kdim=3, vdim=5))
    assert list(apart) == ["q_proj_weight", "k_proj_weight", "v_proj_weight"]


def test_experts():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_local_experts": 3, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    for kind, axes in (("Mixtral", (1, 2)), ("GptOss", (2, 1))):
        config = getattr(transformers, f"{kind}Config")(**sizes)
        model = getattr(transformers, f"{kind}Model")(config)
        experts = next(m for m in model.modules() if type(m).__name__ == f"{kind}Experts")
        weights = weights_of(experts)
        assert set(weights) == {"gate_up_proj", "down_proj"}
        for key, weight in weights.items():
            shape = experts.get_parameter(key).shape
            assert (weight.outputs, weight.inputs) == axes and weight.matrices == (0,) and shape[0] == 3
            assert shape[weight.inputs] == (8 if key == "gate_up_proj" else 12)


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.table = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


def test_layers_of_ones_own(monkeypatch):
    model = nn.Sequential(Mine(), nn.Linear(6, 2))
    layers = {Mine: {"kern*": Weight(outputs=1, inputs=0)}}
    assert list(drive.Masks.dense(model)) == ["1.weight"]
    assert list(drive.Masks.dense(model, layers=layers)) == ["0.kernel", "1.weight"]
    options = {
        "method": "magnitude",
        "sparsity": 0.5,
        "structure": "2:4",
        "include": "0.*",
        "progress": False,
    }
    mask = drive.prune(model, [], layers=layers, **options)["0.kernel"]
    assert (mask.sum(0) == 2).all(), "along the inputs"
    monkeypatch.setattr(registry, "_registered", {})
    registry._looked_up.cache_clear()
    register_layer(Mine, lambda module: {"kernel": Weight(outputs=1, inputs=0)})
    assert list(drive.Masks.dense(nn.Sequential(type("Sub", (Mine,), {})()))) == ["0.kernel"]
    assert list(drive.Masks.dense(model, layers={Mine: {}})) == ["1.weight"]
    registry._looked_up.cache_clear()


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    (
        ({int: {}}, TypeError, "a layer must be a subclass of nn.Module, got <class 'int'>"),
        (
            {Mine: {"kernel": 1}},
            TypeError,
            "weights of Mine must be a mapping.*, got {'kernel': 1}",
        ),
        (
            {Mine: lambda module: None},
            TypeError,
            "weights of Mine must be a mapping.*, got None",
        ),
        (
            {Mine: {"kernel": Weight(inputs=2)}},
            ValueError,
            r"Mine.kernel must have the axes.*, got shape \(4, 6\)",
        ),
        (
            {Mine: {"kernel": Weight(parts=3)}},
            ValueError,
            r"Mine.kernel must have the axes.*, got shape \(4, 6\)",
        ),
        ([Mine], TypeError, "layers must be a mapping of module types, got list"),
    ),
)
def test_wrong_layers(layers, error, words: str):
    with pytest.raises(error, match=words):
        drive.Masks.dense(nn.Sequential(Mine()), layers=layers)

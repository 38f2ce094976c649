"""hadamard_init_ against its definition, what layers then compute, and what stays as it was."""

from __future__ import annotations

import copy
import logging
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.nn.utils import weight_norm as old_weight_norm

import drive
from drive.layers import Weight
from drive.pipeline import hadamard_init_


def sylvester(order: int) -> Tensor:
    """By its recursion, normalised, in float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(order):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / 2 ** (order / 2)


def corner(outputs: int, inputs: int) -> Tensor:
    order = 0
    while 2**order < max(outputs, inputs):
        order += 1
    return sylvester(order)[:outputs, :inputs]


def expected(outputs: int, inputs: int) -> Tensor:
    if outputs > inputs:
        return corner(outputs, inputs)
    return torch.eye(outputs, inputs, dtype=torch.float64)


def started(model: nn.Module, *args, **kwargs) -> nn.Module:
    hadamard_init_(model, *args, **kwargs)
    return model


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


SHAPES = [
    (1, 1),
    (2, 1),
    (3, 1),
    (5, 2),
    (7, 4),
    (8, 4),
    (9, 8),
    (33, 7),
    (64, 63),
    (100, 3),
    (4, 4),
    (3, 8),
    (1, 5),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matrix(shape: tuple[int, int], dtype: torch.dtype):
    model = started(nn.Sequential(nn.Linear(1, 1), nn.Linear(*shape[::-1], dtype=dtype)))
    tolerance = 1e-15 if dtype == torch.float64 else 1e-7
    torch.testing.assert_close(
        model[1].weight.detach(), expected(*shape).to(dtype), rtol=tolerance, atol=0 if shape[0] > 1 else 1e-7
    )
    assert not model[1].bias.any()


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_columns_are_orthonormal_where_there_are_2_to_the_q_outputs(order: int):
    weight = started(nn.Linear(2**order - 1, 2**order, dtype=torch.float64)).weight.detach()
    torch.testing.assert_close(weight.T @ weight, torch.eye(2**order - 1, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(16, 16), (32, 5), (5, 32), (64, 33)])
def test_singular_values_are_1(shape: tuple[int, int]):
    weight = started(nn.Sequential(nn.Linear(1, 1), nn.Linear(*shape[::-1], dtype=torch.float64)))[1].weight
    torch.testing.assert_close(torch.linalg.svdvals(weight), torch.ones(min(shape), dtype=torch.float64))


@pytest.mark.parametrize("outputs, inputs", [(3, 8), (8, 8), (8, 3), (300, 784)])
def test_first(outputs: int, inputs: int):
    def weights(*first) -> list[Tensor]:
        model = nn.Sequential(nn.Conv2d(4, 2, 1), nn.Linear(inputs, outputs), nn.Linear(outputs, 2))
        return [p.detach().double() for p in started(model, *first).parameters()][::2]

    hadamard, identity = corner(outputs, inputs).float().double(), torch.eye(outputs, inputs).double()
    assert torch.equal(weights("hadamard")[1], hadamard)
    assert torch.equal(weights("identity")[1], identity)
    assert torch.equal(weights()[1], identity if outputs == inputs else hadamard)
    for first in ("hadamard", "identity", None):
        others = weights(first)[::2]
        assert torch.equal(others[0].flatten(1), expected(2, 4))
        assert torch.equal(others[1], expected(2, outputs))


def test_a_first_that_is_none():
    model = nn.Linear(4, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="first must be 'identity', 'hadamard' or None, got 'Hadamard'"):
        hadamard_init_(model, "Hadamard")
    assert not changed(model, before)


CONVS = {
    "1d": (partial(nn.Conv1d, 6, 8, 3, padding=1), 1),
    "2d narrowing": (partial(nn.Conv2d, 8, 6, 3, padding=1), 2),
    "3d": (partial(nn.Conv3d, 2, 3, 3, padding=1), 3),
    "not square": (partial(nn.Conv2d, 6, 12, (1, 5), padding=(0, 2)), 2),
    "grouped": (partial(nn.Conv2d, 6, 9, 3, padding=1, groups=3), 2),
    "depthwise": (partial(nn.Conv2d, 6, 6, 5, padding=2, groups=6), 2),
    "depthwise, widening": (partial(nn.Conv1d, 4, 12, 3, padding=1, groups=4), 1),
    "dilated": (partial(nn.Conv2d, 4, 4, 3, padding=2, dilation=2), 2),
    "transposed": (partial(nn.ConvTranspose2d, 6, 8, 3, padding=1), 2),
    "transposed, grouped": (partial(nn.ConvTranspose1d, 6, 9, 3, padding=1, groups=3), 1),
    "transposed 3d": (partial(nn.ConvTranspose3d, 5, 2, (1, 3, 5), padding=(0, 1, 2)), 3),
}


@pytest.mark.parametrize("conv", CONVS)
def test_a_convolution_multiplies_each_pixel(conv: str):
    make, dim = CONVS[conv]
    layer = started(make(dtype=torch.float64))
    x = torch.randn(2, layer.in_channels, *(4, 5, 6)[:dim], dtype=torch.float64)
    groups = layer.groups
    matrix = torch.block_diag(*[expected(layer.out_channels // groups, layer.in_channels // groups)] * groups)
    torch.testing.assert_close(layer(x), torch.einsum("oi,bi...->bo...", matrix, x))


def test_an_even_kernel_shifts():
    layer = started(nn.Conv2d(3, 3, (2, 4)))
    x = torch.randn(1, 3, 6, 8)
    assert torch.equal(layer(x), x[:, :, 1:, 2:-1])  # taps 1 and 2


def test_channels_last_stays():
    plain, last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    assert torch.equal(started(plain).weight, started(last).weight)
    assert last.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 12}])
def test_attention(sizes: dict[str, int]):
    layer = started(nn.MultiheadAttention(8, 2, **sizes))
    if sizes:
        assert torch.equal(layer.q_proj_weight, torch.eye(8))
        assert torch.equal(layer.k_proj_weight, corner(8, 5).float())
        assert torch.equal(layer.v_proj_weight, torch.eye(8, 12))
    else:
        assert torch.equal(layer.in_proj_weight, torch.eye(8).repeat(3, 1))
    assert torch.equal(layer.out_proj.weight, torch.eye(8))
    assert not layer.in_proj_bias.any() and not layer.out_proj.bias.any()


def test_conv1d_of_transformers():
    layer = started(pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 5))  # [inputs, outputs]
    torch.testing.assert_close(layer.weight.detach().T, corner(12, 5).float())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(3, 4, 10))  # experts, inputs, two outputs in one
        self.bias = nn.Parameter(torch.randn(10))


def test_layers_of_ones_own():
    axes = {"kernels": Weight(outputs=2, inputs=1, matrices=(0,), stacked=2, parts=2)}
    model = started(Experts(), layers={Experts: axes})
    one = corner(5, 4).float()
    torch.testing.assert_close(model.kernels.detach(), torch.cat([one, one]).T.expand(3, 4, 10))
    assert not model.bias.any()


def test_norms_and_what_stays():
    model = nn.ModuleDict(
        {
            "batch": nn.BatchNorm2d(4),
            "plain": nn.BatchNorm1d(4, affine=False),
            "layer": nn.LayerNorm(4),
            "embedding": nn.Embedding(5, 4),
        }
    )
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(torch.full_like(tensor, 3))
    before = copy.deepcopy(model.state_dict())
    hadamard_init_(model)
    assert changed(model, before) == ["batch.weight", "batch.bias"]
    assert torch.equal(model["batch"].weight, torch.ones(4)) and not model["batch"].bias.any()


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, 4))


def test_what_nobody_knows_how_to_start_is_named(caplog: pytest.LogCaptureFixture):
    recurrent = nn.LSTM(4, 4)
    parametrizations.weight_norm(recurrent, "weight_hh_l0")
    model = nn.ModuleDict(
        {"lstm": recurrent, "cell": nn.GRUCell(4, 4), "learned": Learned(), "out": nn.Linear(4, 4)}
    )
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        hadamard_init_(model)
    assert changed(model, before) == ["out.weight", "out.bias"]
    for name in ("lstm.weight_ih_l0", "cell.weight_hh", "learned.positions"):
        assert name in caplog.text
    assert "out" not in caplog.text and "bias" not in caplog.text


def test_nothing_is_said_where_all_is_known(caplog: pytest.LogCaptureFixture):
    hadamard_init_(nn.Sequential(nn.Embedding(5, 4), nn.TransformerEncoderLayer(4, 2), nn.BatchNorm1d(4)))
    assert not caplog.text


def test_tied_weights_are_as_the_first_layer_has_them():
    linear, other = nn.Linear(3, 5), nn.Linear(3, 5)
    other.weight = linear.weight
    model = started(nn.Sequential(nn.Linear(1, 1), linear, other))
    torch.testing.assert_close(linear.weight.detach(), corner(5, 3).float())
    assert other.weight is linear.weight and not other.bias.any()

    conv = nn.Conv1d(4, 4, 1)
    up = nn.ConvTranspose1d(4, 8, 1)
    up.weight = nn.Parameter(torch.randn(4, 8, 1))
    conv.weight = up.weight  # [4, 8, 1]: of 8 inputs to 4 outputs, first
    model = started(nn.Sequential(conv, up))
    assert torch.equal(model[0].weight.flatten(1), torch.eye(4, 8))


@pytest.mark.parametrize("head_first", [False, True])
def test_heads_that_are_tied_to_an_embedding_stay(head_first: bool, caplog: pytest.LogCaptureFixture):
    parts = {"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9)}
    parts["head"].weight = parts["embedding"].weight
    model = nn.ModuleDict(dict(reversed(parts.items())) if head_first else parts)
    before = copy.deepcopy(model.state_dict())
    hadamard_init_(model)
    assert changed(model, before) == ["head.bias"]
    assert "head.weight" in caplog.text


def meta(layer: nn.Module) -> nn.Module:
    return layer.to("meta")


def custom(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "bias", nn.Softplus())
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    torch_prune.l1_unstructured(layer, "weight", 3)
    return layer


def standardised() -> nn.Module:
    return pytest.importorskip("timm.layers").StdConv2d(4, 4, 3)


REFUSED = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "1.0.weight must be a parameter"),
    "the old one": (lambda: old_weight_norm(nn.Conv2d(4, 4, 3)), "1.0.weight must be a parameter"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), "1.0.weight must be a"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "1.0.weight must be a parameter"),
    "a bias": (lambda: custom(nn.Linear(4, 4)), "1.0.bias must be a parameter"),
    "a norm": (lambda: custom(nn.BatchNorm1d(4)), "1.0.bias must be a parameter"),
    "torch's pruning": (lambda: pruned(nn.Linear(4, 4)), "1.0.weight must be a parameter"),
    "standardised": (standardised, "1.0.weight is standardised before it is used"),
    "lazy": (lambda: nn.LazyLinear(4), "1.0.weight is not initialised yet"),
    "a lazy norm": (lambda: nn.LazyBatchNorm1d(), "1.0.weight is not initialised yet"),
    "meta": (lambda: meta(nn.Linear(4, 4)), "1.0.weight has no data"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*", "ignore:Lazy modules")
@pytest.mark.parametrize("layer", REFUSED)
def test_refused_before_anything_is_changed(layer: str):
    make, message = REFUSED[layer]
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Sequential(make()))
    before, rest = copy.deepcopy(model[0].state_dict()), list(model[1].state_dict().values())
    versions = [None if tensor.is_meta else tensor._version for tensor in rest]
    with pytest.raises(ValueError, match=f"^hadamard_init_: {message}"):
        hadamard_init_(model)
    assert not changed(model[0], before)
    assert versions == [None if tensor.is_meta else tensor._version for tensor in rest]


def test_parametrised_embeddings_are_none_of_its_business():
    model = nn.Sequential(parametrizations.weight_norm(nn.Embedding(5, 4)), nn.Linear(4, 4))
    assert torch.equal(started(model)[1].weight, torch.eye(4))


def test_no_random_numbers_and_no_graph():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 16))
    model[0].weight.requires_grad_(False)
    before = torch.get_rng_state()
    hadamard_init_(model)
    assert torch.equal(before, torch.get_rng_state())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad_fn is None and p.grad is None for p in model.parameters())
    assert model[0].weight[:, :, 1, 1].any()


def test_empty_and_without_weights():
    hadamard_init_(nn.ReLU())
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4))
    assert not started(model)[1].bias.any()


def test_scores_by_weights_tie_at_this_start():
    torch.manual_seed(0)
    model = started(
        nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    )
    before = copy.deepcopy(model.state_dict())
    batch = torch.rand(8, 16), torch.arange(8) % 4
    with pytest.raises(ValueError, match="score 0"):
        drive.prune(
            model, [batch], nn.functional.cross_entropy, method="snip", sparsity=0.5, progress=False
        )  # fmt: skip
    assert not changed(model, before)

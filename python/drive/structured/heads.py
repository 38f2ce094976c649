"""Heads of attentions: which outputs of the projections make a head, and which inputs read it.

Attentions are found by what they have: projections under the names that torch, timm and transformers give
them, and the size of a head. That the guess is right is checked like all couplings (`check`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from drive.layers import Layers, Weight, weights_of

# Query, key and value, apart or in one, and the output: paths of children
_APART = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
)
_FUSED = (("qkv", "proj"), ("c_attn", "c_proj"))
_HEAD = "head_dim", "attention_head_size", "dim_per_head"
_HEADS = "num_heads", "num_attention_heads", "n_heads", "n_head"
_KV_HEADS = "num_key_value_heads", "num_kv_heads"
_WIDTHS = "all_head_size", "attn_dim", "split_size"


class Projection(NamedTuple):
    """A parameter of an attention, and where its heads lie.

    Attributes:
        module, key: whose parameter it is.
        axis: that the heads lie along.
        indices: [heads, n].
    """

    module: nn.Module
    key: str
    axis: int
    indices: Tensor


class Attention(NamedTuple):
    """An attention whose heads can go.

    Attributes:
        heads: of the keys, which several of the queries may share.
        shared: queries of a key.
        size: of a head.
        rows, vectors: of query, key and value: weights, and biases.
        columns: of the output.
        holders: modules that know the number of heads.
    """

    heads: int
    shared: int
    size: int
    rows: list[Projection]
    vectors: list[Projection]
    columns: list[Projection]
    holders: list[nn.Module]


def attentions(model: nn.Module, layers: Layers | None = None) -> Iterator[tuple[str, nn.Module, Attention]]:
    """Attentions whose heads are known, by name, none inside of another one."""
    outer = ""
    for name, module in model.named_modules():
        if outer and name.startswith(outer):
            continue
        found = attention_of(module, layers)
        if found is not None:
            outer = f"{name}."
            yield name, module, found


def attention_of(module: nn.Module, layers: Layers | None = None) -> Attention | None:
    """The heads of a module, if it is an attention of a known kind."""
    if isinstance(module, nn.MultiheadAttention):
        return _of_torch(module)
    for paths in _APART:
        if (matrices := _matrices(module, paths, layers)) is not None:
            return _apart(module, *matrices)
    for two in _FUSED:
        if (matrices := _matrices(module, two, layers)) is not None:
            return _fused(module, *matrices)
    return None


def resize(attention: Attention, heads: int) -> None:
    """Tell the modules that there are so many heads of keys now."""
    before = attention.heads * attention.shared
    new = {
        **dict.fromkeys(_HEADS, (before, heads * attention.shared)),
        **dict.fromkeys(_KV_HEADS, (attention.heads, heads)),
        **dict.fromkeys(_WIDTHS, (before * attention.size, heads * attention.shared * attention.size)),
        "kv_dim": (attention.heads * attention.size, heads * attention.size),
    }
    for holder in attention.holders:
        for name, (old, now) in new.items():
            if getattr(holder, name, None) == old:
                setattr(holder, name, now)


class _Matrix(NamedTuple):
    """A layer of an attention, with so many outputs and inputs, along these axes of its weight."""

    module: nn.Module
    outputs: int
    inputs: int
    axes: Weight

    def made(self, indices: Tensor) -> list[Projection]:
        return [Projection(self.module, "weight", self.axes.outputs, indices)]

    def added(self, indices: Tensor) -> list[Projection]:
        there = self.module._parameters.get("bias") is not None
        return [Projection(self.module, "bias", 0, indices)] if there else []

    def read(self, indices: Tensor) -> list[Projection]:
        return [Projection(self.module, "weight", self.axes.inputs, indices)]


def _matrices(module: nn.Module, paths: Sequence[str], layers: Layers | None) -> list[_Matrix] | None:
    """The layers at these paths; None if there is one that is none."""
    found = []
    for path in paths:
        layer = _child(module, path)
        axes = None if layer is None else weights_of(layer, layers).get("weight")
        weight = None if layer is None else layer._parameters.get("weight")
        if layer is None or axes is None or weight is None:
            return None
        found.append(_Matrix(layer, weight.shape[axes.outputs], weight.shape[axes.inputs], axes))
    return found


def _of_torch(module: nn.MultiheadAttention) -> Attention | None:
    """Of one width: query, key and value in one parameter."""
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        return None
    heads, size = module.num_heads, module.head_dim
    rows = _stacked(3, heads, size)
    biased = module.in_proj_bias is not None
    return Attention(
        heads, 1, size,
        rows=[Projection(module, "in_proj_weight", 0, rows)],
        vectors=[Projection(module, "in_proj_bias", 0, rows)] if biased else [],
        columns=[Projection(module.out_proj, "weight", 1, _stacked(1, heads, size))],
        holders=[module],
    )  # fmt: skip


def _apart(
    module: nn.Module, query: _Matrix, key: _Matrix, value: _Matrix, output: _Matrix
) -> Attention | None:
    holders = [module, *(child for child in module.children() if query.module in child.children())]
    size = _size(holders, query.outputs)
    fits = key.outputs == value.outputs and output.inputs == query.outputs
    if not size or not fits or key.outputs % size or query.outputs % key.outputs:
        return None
    heads, shared = key.outputs // size, query.outputs // key.outputs
    one, several = _stacked(1, heads, size), _stacked(1, heads, shared * size)
    three = ((query, several), (key, one), (value, one))
    return Attention(
        heads, shared, size,
        rows=[row for matrix, indices in three for row in matrix.made(indices)],
        vectors=[bias for matrix, indices in three for bias in matrix.added(indices)],
        columns=output.read(several),
        holders=holders,
    )  # fmt: skip


def _fused(module: nn.Module, fused: _Matrix, output: _Matrix) -> Attention | None:
    """Query, key and value one after the other in one weight."""
    width, rest = divmod(fused.outputs, 3)
    size = _size([module], width)
    if rest or not size or width % size or output.inputs != width:
        return None
    heads = width // size
    rows = _stacked(3, heads, size)
    columns = output.read(_stacked(1, heads, size))
    return Attention(heads, 1, size, fused.made(rows), fused.added(rows), columns, [module])


def _stacked(parts: int, heads: int, size: int) -> Tensor:
    """[heads, parts * size] indices of [parts, heads, size] that lie one after the other."""
    return torch.arange(parts * heads * size).view(parts, heads, size).transpose(0, 1).reshape(heads, -1)


def _size(holders: list[nn.Module], width: int) -> int | None:
    """Of a head, as the modules have it; else by their number."""
    for name in _HEAD:
        for holder in holders:
            if isinstance(size := getattr(holder, name, None), int):
                return size
    for name in _HEADS:
        for holder in holders:
            if isinstance(heads := getattr(holder, name, None), int) and heads and width % heads == 0:
                return width // heads
    return None


def _child(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found

"""The layers of torch and of packages that people use with it, by package and class: none is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from .record import Layer, Weight, Weights, input_positions, output_positions, steps

_LINEAR: Weights = {"weight": Weight()}
_TRANSPOSED_LINEAR: Weights = {"weight": Weight(outputs=1, inputs=0)}


@cache
def _in_groups(transposed: bool, groups: int) -> Weights:
    """[outputs, inputs of a group, ...], or [inputs, outputs of a group, ...]: groups one after the other."""
    if transposed:
        return {"weight": Weight(outputs=1, inputs=0, parts=groups, uses=input_positions)}
    return {"weight": Weight(parts=groups, uses=output_positions)}


def _conv(module: Any) -> Weights:
    return _in_groups(module.transposed, module.groups)


def _attention(module: Any) -> Weights:
    """nn.MultiheadAttention: q, k and v in one, [3 E, E], or apart; out_proj is a layer of its own."""
    return {"in_proj_weight": Weight(parts=3), "[qkv]_proj_weight": Weight()}


def _recurrent(gates: int) -> Layer:
    """[gates * hidden, inputs]; the projection of an LSTM's hidden state is one matrix."""
    weight = Weight(parts=gates, uses=steps)
    return {"weight_ih*": weight, "weight_hh*": weight, "weight_hr*": Weight(uses=steps)}


def _experts(module: Any) -> Weights:
    """transformers' experts: [experts, outputs, inputs], or the other way round where they say so."""
    transposed = getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")
    outputs, inputs = (2, 1) if transposed else (1, 2)
    one = Weight(outputs, inputs, matrices=(0,), stacked=outputs)
    both = replace(one, parts=2 if getattr(module, "is_concatenated", True) else 1)  # else in turns
    return {"gate_up_proj": both, "*_proj": one, "weight": one}


_CELLS = {"RNN": 1, "LSTM": 4, "GRU": 3}

# Package and class ("*" stands for anything), subclasses included; a layer's first key that fits counts
KNOWN: Mapping[tuple[str, str], Layer] = {
    ("torch", "Linear"): _LINEAR,
    **{("torch", f"Conv{d}d"): _conv for d in (1, 2, 3)},
    **{("torch", f"ConvTranspose{d}d"): _conv for d in (1, 2, 3)},
    ("torch", "MultiheadAttention"): _attention,
    **{("torch", name + end): _recurrent(gates) for name, gates in _CELLS.items() for end in ("", "Cell")},
    ("transformers", "Conv1D"): _TRANSPOSED_LINEAR,
    ("transformers", "*Experts"): _experts,
    ("transformers", "*FlexibleLinear"): _experts,
    ("transformers", "*Router"): _LINEAR,
    ("torch_geometric", "Linear"): _LINEAR,
    ("torch_geometric", "*RGCNConv"): {
        "weight": Weight(outputs=2, inputs=1, matrices=(0,), stacked=2),
        "root": Weight(outputs=1, inputs=0),
    },
    ("torch_geometric", "HeteroLinear"): {"weight": Weight(outputs=2, inputs=1, matrices=(0,), stacked=2)},
}

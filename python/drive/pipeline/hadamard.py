"""Weights to start from without random numbers: identities and Hadamard matrices."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from drive.distributed.placement import is_dtensor
from drive.layers import Layers, Weight, fitting
from drive.targets.candidates import EMBEDDING, STANDARDISED, TIED, VECTOR, candidates
from drive.targets.matrices import boxes
from drive.targets.targets import DTYPES, check_data
from drive.targets.wrappers import named_modules

_log = logging.getLogger(__name__)

Form = Literal["identity", "hadamard"]

_OP = "hadamard_init_"
_RECURRENT = nn.RNNBase, nn.RNNCellBase


@torch.no_grad()
def hadamard_init_(model: nn.Module, first: Form | None = None, *, layers: Layers | None = None) -> None:
    """Set a model's weights to identities and parts of Hadamard matrices, in place: ZerO initialisation.

    A matrix W of m outputs and n inputs becomes

    - "identity", if m <= n: ones on the main diagonal, else 0;
    - "hadamard", if m > n: W[i, j] = (-1)^popcount(i AND j) / 2^(q/2), q = ceil(log2 m), the top left corner
      of the normalised Hadamard matrix of order 2^q. Its columns are orthonormal if m is a power of 2.

    So does each matrix of every layer type that is known (docs/layers.md), frozen ones too: q, k and v of
    attention, every expert, every group of a convolution. A convolution has it at the centre of its kernel,
    index k // 2 of every dimension, and 0 elsewhere; if k is even there is no centre, and the output is
    shifted by half a pixel. Biases of these layers become 0, weights of BatchNorm 1 and its biases 0; its
    running statistics stay. Tied weights are written once, as the first layer has them.

    All else stays as it is: embeddings, heads that are tied to one, LayerNorm and the like. The gates of
    recurrent layers, of which the paper says nothing, and parameters of layer types that are not known stay,
    too, and the logger `drive.pipeline.hadamard` names them.

    The start is the same for every seed: two runs differ only in the order of their data, in dropout and the
    like. Most weights are 0, so that methods that score at this start raise for scores that tie at 0: train
    first. For ResNets the paper changes the architecture; this is the plain rule layer by layer. Both
    convolutions of a torchvision block become identities, and but for its norms it doubles its input.

    Args:
        model: with all its weights in memory and on no more than one rank.
        first: form of the first nn.Linear in `model.modules()`, whatever its shape. None: "hadamard" if m < n
            as well, with q = ceil(log2 n), else the plain rule. An identity would drop all but the first m
            inputs: an MLP 784-300-100-10 that starts with it passes the first 10 pixels on, and where images
            have black borders the gradients of all its weights are exactly 0 (`check_gradients`).
        layers: types that go before those that are registered or known, as in `drive.prune`.

    Raises:
        ValueError: a `first` that is none; a weight that is computed from other parameters (`weight_norm`,
            parametrisations, `torch.nn.utils.prune`) or standardised; without data; a DTensor.
        TypeError: a weight that is quantised, or no tensor of floating-point numbers; `layers` that are none.
        Nothing is changed then.

    Source: Zhao et al., ZerO Initialization: Initializing Neural Networks with only Zeros and Ones,
    arXiv 2110.12661, Algorithm 1.
    """
    if first not in ("identity", "hadamard", None):
        raise ValueError(f"{_OP}: first must be 'identity', 'hadamard' or None, got {first!r}")
    planned, left = _planned(model, layers)
    linear = next((module for module in model.modules() if isinstance(module, nn.Linear)), None)
    foremost = None if linear is None else linear._parameters.get("weight")
    for tensor, value in planned:
        if not isinstance(value, Weight):
            tensor.fill_(value)
        elif tensor is foremost:
            _write(tensor, value, first, narrowing="hadamard")
        else:
            _write(tensor, value)
    if left:
        _log.warning("%s: left as they are: %s", _OP, ", ".join(left))


_Value = Weight | float  # matrices along these axes, or one number everywhere


def _planned(model: nn.Module, layers: Layers | None) -> tuple[list[tuple[Tensor, _Value]], list[str]]:
    """What becomes of which tensors, tied ones once; names of those that stay and are none of the usual."""
    reasons = {id(c.tensor): c.reason for c in candidates(model, layers, op=_OP)}
    planned: dict[int, tuple[Tensor, _Value]] = {}
    left: dict[int, str] = {}
    for path, module in named_modules(model):
        own = {key: tensor for key, tensor in module._parameters.items() if tensor is not None}
        computed = _computed(module)
        values = _values(module, {**own, **computed}, layers)
        names = {key: f"{path}.{key}" if path else key for key in (*own, *computed)}
        if wrong := [names[key] for key in computed if key in values]:
            raise ValueError(
                f"{_OP}: {wrong[0]} must be a parameter, got one that is computed from others (parametrised, "
                "normalised, pruned): initialise the model before"
            )
        for key, tensor in own.items():
            reason = reasons[id(tensor)]
            if key in values and not reason.startswith((EMBEDDING, TIED)):
                _check(names[key], tensor, reason, model)
                planned.setdefault(id(tensor), (tensor, values[key]))
            elif key in values or reason not in (EMBEDDING, VECTOR):
                left.setdefault(id(tensor), names[key])
    return list(planned.values()), [name for key, name in left.items() if key not in planned]


def _values(module: nn.Module, tensors: dict[str, Tensor], layers: Layers | None) -> dict[str, _Value]:
    """By the keys of a module's tensors; those that stay are not there."""
    if isinstance(module, _RECURRENT):
        return {}
    if isinstance(module, _NormBase):
        return {key: value for key, value in (("weight", 1.0), ("bias", 0.0)) if key in tensors}
    weights = fitting(module, tensors, layers, op=_OP)
    biases = [key for key in tensors if key.endswith("bias")] if weights else []
    return {**dict.fromkeys(biases, 0.0), **weights}


def _computed(module: nn.Module) -> dict[str, Tensor]:
    """What stands for a parameter without being one, by its key: the tensor, or one of as many dimensions."""
    found = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}  # set by hooks
    chains = module._modules.get("parametrizations")
    for key, chain in chains.items() if isinstance(chains, nn.ModuleDict) else ():
        if isinstance(chain, ParametrizationList):  # not asked for its value: spectral_norm would iterate
            originals = [*chain._parameters.values(), *chain._buffers.values()]
            found[key] = max((tensor for tensor in originals if tensor is not None), key=Tensor.dim)
    return found


def _check(name: str, tensor: Tensor, reason: str, model: nn.Module) -> None:
    """Raise unless the tensor can be written, and is what its layer multiplies by."""
    if reason == STANDARDISED:
        raise ValueError(f"{_OP}: {name} is {reason}: no matrix that is written there would be what is used")
    check_data(_OP, name, tensor, model)
    if is_dtensor(tensor):
        raise ValueError(f"{_OP}: {name} must be a plain tensor, got a DTensor: initialise before sharding")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{_OP}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _write(weight: Tensor, axes: Weight, form: Form | None = None, narrowing: Form = "identity") -> None:
    """Write a weight's matrices.

    Args:
        form: of them; None: `narrowing` if they have fewer outputs than inputs, else the plain rule.
    """
    weight.zero_()
    if not weight.numel():
        return
    across = axes.outputs, axes.inputs
    index = tuple(
        slice(None) if axis in across else 0 if axis in axes.matrices else size // 2  # a kernel's centre
        for axis, size in enumerate(weight.shape)
    )
    for box in boxes(weight.shape, axes):
        piece = weight[box][index]
        if axes.outputs > axes.inputs:
            piece = piece.T
        outputs, inputs = piece.shape
        by_shape = "hadamard" if outputs > inputs else narrowing if outputs < inputs else "identity"
        if (form or by_shape) == "identity":
            piece.diagonal().fill_(1.0)
        else:
            piece.copy_(_hadamard(outputs, inputs, piece))


def _hadamard(outputs: int, inputs: int, like: Tensor) -> Tensor:
    """The top left corner of the normalised Hadamard matrix, on the device of `like`, in at least float32."""
    order = (max(outputs, inputs) - 1).bit_length()
    digits = torch.arange(order, device=like.device)

    def bits(count: int) -> Tensor:
        numbers = torch.arange(count, device=like.device)
        return (numbers[:, None] >> digits & 1).float()

    signs = (
        (bits(outputs) @ bits(inputs).T).remainder_(2).mul_(-2).add_(1)
    )  # popcounts, exact in any precision
    return signs.to(torch.promote_types(like.dtype, torch.float32)) * 2 ** (-order / 2)

"""Which tensors of an optimizer's state are entry-wise: one number for each weight, zero where that is
pruned.

Others of the same shape are not: SOAP's and Shampoo's preconditioners of a square weight, 8-bit codes of
which 0 is not the number 0. So what is not known to be is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from drive.distributed.placement import is_dtensor

_log = logging.getLogger(__name__)

_ADAM = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# package -> classes -> states. A subclass of one is taken for it. Without those whose 0 is not where they
# start from and would stay 0 (Rprop's step sizes), and what is not of the weight's shape, which is left alone
# anyway.
_COMMON: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "torch": {
        "SGD": ("momentum_buffer",),
        **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "SparseAdam"), _ADAM),
        "Adamax": ("exp_avg", "exp_inf"),
        "Adagrad": ("sum",),
        "Adadelta": ("square_avg", "acc_delta"),
        "RMSprop": ("square_avg", "momentum_buffer", "grad_avg"),
        "Rprop": ("prev",),
        "ASGD": ("ax",),
        "Adafactor": ("variance",),
        "Muon": ("momentum_buffer",),
        "LBFGS": (),
    },
    "timm": {
        **dict.fromkeys(
            ("AdamWLegacy", "AdamP", "Adopt", "Lamb", "LaProp", "NAdamLegacy", "NAdamW", "RAdamLegacy"), _ADAM
        ),
        "Lion": ("exp_avg",),
        "AdaBelief": ("exp_avg", "exp_avg_var", "max_exp_avg_var"),
        "Adafactor": ("exp_avg", "exp_avg_sq"),
        "AdafactorBigVision": ("exp_avg", "exp_avg_sq"),
        "Adahessian": ("exp_avg", "exp_hessian_diag_sq"),
        "Adan": ("exp_avg", "exp_avg_diff", "exp_avg_sq", "pre_grad", "neg_pre_grad"),
        "Kron": ("momentum_buffer",),
        "Lars": ("momentum_buffer",),
        "MADGRAD": ("grad_sum_sq", "s", "x0"),
        "Mars": ("exp_avg", "exp_avg_sq", "last_grad"),
        "Muon": ("exp_avg", "exp_avg_sq", "momentum_buffer"),
        "NvNovoGrad": ("exp_avg",),
        "RMSpropTF": ("square_avg", "momentum_buffer", "grad_avg"),
        "SGDP": ("momentum",),
        "SGDW": ("momentum_buffer",),
    },
    "transformers": {"Adafactor": ("exp_avg", "exp_avg_sq")},
    "apex": {
        **dict.fromkeys(("FusedAdam", "FusedLAMB", "FusedNovoGrad"), _ADAM),
        "FusedSGD": ("momentum_buffer",),
        "FusedAdagrad": ("sum",),
    },
    "deepspeed": dict.fromkeys(("FusedAdam", "DeepSpeedCPUAdam"), _ADAM),
    "bitsandbytes": {"Optimizer1State": ("state1",), "Optimizer2State": ("state1", "state2")},
    "torchao": {"_AdamBase": _ADAM},
    "schedulefree": {
        "SGDScheduleFree": ("z",),
        "AdamWScheduleFree": ("z", "exp_avg_sq"),
        "RAdamScheduleFree": ("z", "exp_avg_sq"),
    },
    "lion_pytorch": {"Lion": ("exp_avg",)},
    "prodigyopt": {"Prodigy": ("exp_avg", "exp_avg_sq", "s")},
}
_ADDED = ("lookahead_slow_buff",)  # by timm's Lookahead, to the state of the optimizer in it
_registered: dict[type[Optimizer], tuple[str, ...]] = {}
_registrations = 0  # with each of them what was looked up before, or just now in another thread, is forgotten


def register_optimizer(kind: type[Optimizer], *states: str) -> None:
    """Say which tensors of an optimizer's state are entry-wise, so that `Masks.attach` may set them to 0.

    They are what `optimizer.state[weight]` holds under these names: moments of a weight's gradient, averages
    or copies of the weight. An optimizer that nobody has told of keeps its state as it is (its gradients and
    weights are zero where pruned all the same). Known are those of torch, timm, transformers and some more
    packages.

    Args:
        kind: the optimizer's class; its subclasses are taken for it.
        states: names, none where nothing is entry-wise.

    Raises:
        TypeError: not a class of optimizers, or a name that is no string.
    """
    global _registrations
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise TypeError(f"register_optimizer: kind must be a subclass of torch.optim.Optimizer, got {kind!r}")
    if wrong := [state for state in states if not isinstance(state, str)]:
        raise TypeError(f"register_optimizer: states must be names, got {wrong[0]!r}")
    _registered[kind] = states
    _registrations += 1


def entrywise(optimizer: Optimizer, weight: Tensor) -> Iterator[Tensor]:
    """The tensors of the optimizer's state that hold a number for each entry of the weight, if known to."""
    state = optimizer.state.get(weight)
    if not state:
        return
    for name in _names(type(optimizer), _registrations):  # type: ignore[arg-type, unused-ignore]
        tensor = state.get(name)
        plain = type(tensor) in (Tensor, nn.Parameter) or is_dtensor(tensor)  # codes of 8 bits are subclasses
        if plain and tensor.shape == weight.shape and tensor.is_floating_point():
            yield tensor


@cache
def _names(kind: type[Any], registrations: int) -> tuple[str, ...]:
    for base in kind.__mro__:
        known = _registered.get(base)
        if known is None:
            known = _COMMON.get(base.__module__.partition(".")[0], {}).get(base.__name__)
        if known is not None:
            return known + _ADDED
    _log.warning(
        "attach: the state of optimizer %s is not known and stays as it is, where weights are pruned, too; "
        "drive.register_optimizer tells what in it is entry-wise",
        kind.__name__,
    )
    return _ADDED

"""ReLUs that begin as a smooth function (ToST, arXiv 2206.12755) and end as what they are."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .traced import caller

_RELUS = F.relu, torch.relu, torch.relu_, "relu", "relu_"  # functions, and methods of tensors


class SoftReLU(nn.ReLU):
    """(1 - t) x sigmoid(beta x) + t relu(x); at t = 1 the very relu, infinities and NaN included.

    At t = 0 it is Swish, which is at most 0.2784645 / beta away from relu. An nn.ReLU becomes one by `soften`
    and is one again by `harden`. It never writes into its input, even if the nn.ReLU did (`inplace`).

    Attributes:
        beta: how steep the sigmoid is.
        t: 0-dimensional buffer, in no state_dict: whoever softens says where it is, by `at`.
        soft: is t below 1? Known without asking the device.
    """

    beta: float
    t: Tensor
    soft: bool

    def at(self, t: float) -> None:
        self.t.fill_(t)
        self.soft = t < 1

    def forward(self, input: Tensor) -> Tensor:
        if not self.soft:
            return F.relu(input)
        # silu(beta x) / beta is x sigmoid(beta x), and keeps one tensor for the backward pass instead of two
        return (1 - self.t) * (F.silu(self.beta * input) / self.beta) + self.t * F.relu(input)


def relus(model: nn.Module) -> list[nn.ReLU]:
    """What `soften` is for: exact nn.ReLUs, each once. What is derived from it may compute something else."""
    return [module for module in model.modules() if type(module) is nn.ReLU]


def soften(relu: nn.ReLU, beta: float, device: torch.device) -> None:
    """Make a SoftReLU of it, at t = 0, wherever the model has it."""
    relu.__class__ = SoftReLU
    assert isinstance(relu, SoftReLU)
    relu.beta, relu.soft = beta, True
    relu.register_buffer("t", torch.zeros((), device=device), persistent=False)


def harden(relu: SoftReLU) -> None:
    """Make an nn.ReLU of it again, as a new one is."""
    del relu.t, relu.beta, relu.soft  # a buffer's deletion takes it out of the non-persistent ones, too
    relu.__class__ = nn.ReLU  # type: ignore[assignment]


def check_modules_only(model: nn.Module, graph: fx.Graph | None, *, op: str) -> None:
    """Raise ValueError if some ReLU is called as a function, for only modules can be exchanged.

    Args:
        graph: of `traced`; None: only torch.nn's transformer layers are looked at, which no graph shows the
            inside of.
    """
    calls = (node for node in (graph.nodes if graph else ()) if node.op in ("call_function", "call_method"))
    places = [caller(node) for node in calls if node.target in _RELUS]
    places += [
        name
        for name, module in model.named_modules()
        if getattr(module, "activation", None) in (F.relu, torch.relu)
    ]
    if places:
        raise ValueError(
            f"{op}: {places[0] or 'the model itself'} calls relu as a function, make it an nn.ReLU or pass "
            "activations=False"
        )

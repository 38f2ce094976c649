"""Training after pruning: a sparse network that begins softened and ends as itself."""

from __future__ import annotations

import logging
from itertools import chain
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from .activations import SoftReLU, check_modules_only, harden, relus, soften
from .skips import Skip, connected, disconnect, places
from .traced import traced

_log = logging.getLogger(__name__)

SkipStart = Literal["constant", "zero"]


class Softened(nn.Module):
    """A network whose training is softened at first: the stage after pruning of arXiv 2312.01653.

    Sparse networks are hard to optimise. The tricks of ToST (arXiv 2206.12755) smooth the beginning and give
    way to normal training as t goes from 0 to 1:

        labels        smoothed in the training loss, by `label_smoothing`, which fades with 1 - t
        activations   every nn.ReLU computes (1 - t) x sigmoid(beta x) + t relu(x)
        skips         bn(conv(x)) + (1 - t) BN(conv1x1(x)) around convolutions above 1 x 1, likewise around
                      the hidden layers of an MLP (`drive.pipeline.skips.places` says exactly where)

    It wraps the model as DistributedDataParallel does, which goes around it: DDP(Softened(model)). Names of
    masks are those of the model, and by default only its weights are pruned.

    In ToST's way the skips are not small at first: BN divides by sqrt(var + 1e-5), and var is 1e-8 times
    that of a sum over channels. In an untrained ResNet-18 (random images of 64 x 64) they add 0.05 behind the
    first convolution, 0.3 in the next block and 1.0 in the last (standard deviations; those of BN are 1).
    `skip_start="zero"` begins with the network as it is.

    At t = 1 the network is the bare one, to the bit and at its cost: compiled code is compiled once more
    then, and not by any other step of t. The skips' parameters have gradients of 0 from then on, as DDP wants
    them to have. `finish` takes everything off. DataParallel does not know the skips: use DDP.

    Attributes:
        module: the model, changed in place.
        t: 0-dimensional, float32: in the state_dict, with the skips.

    Args:
        model: is softened in place; its names and, but for the nn.ReLUs, types stay.
        smoothing: the probability that all wrong classes have together in the target at t = 0; 0 to below 1.
        activations: soften what is exactly nn.ReLU?
        skips: add skips? Layers around which none fits are named to the logger.
        beta: how steep the sigmoids are; the larger, the nearer to ReLU.
        until: the part of the training after which t is 1; above 0, at most 1.
        skip_start: weights of the skips' BN: 1 ("constant": ToST's start) or 0 ("zero").

    Raises:
        TypeError: the model is no module.
        ValueError: an argument is not what it says here; the model calls a ReLU as a function, is softened
            already, or is a DistributedDataParallel. The model is as before then.
    """

    t: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        smoothing: float = 0.1,
        activations: bool = True,
        skips: bool = True,
        beta: float = 2.0,
        until: float = 0.5,
        skip_start: SkipStart = "constant",
    ):
        super().__init__()
        _check_model(model)
        for name, value, fits, words in (
            ("smoothing", smoothing, 0 <= smoothing < 1, "at least 0 and below 1"),
            ("beta", beta, 0 < beta < inf, "above 0 and finite"),
            ("until", until, 0 < until <= 1, "above 0 and at most 1"),
            ("skip_start", skip_start, skip_start in ("constant", "zero"), "'constant' or 'zero'"),
        ):
            if not fits:
                raise ValueError(f"Softened: {name} must be {words}, got {value!r}")
        graph = traced(model, op="Softened") if activations or skips else None
        if activations:
            check_modules_only(model, graph, op="Softened")
        soft = relus(model) if activations else []
        around = places(model, graph, op="Softened") if skips else []
        added = [Skip(place, zero=skip_start == "zero") for place in around]
        first = next(chain(model.parameters(), model.buffers()), torch.empty(()))

        for relu in soft:
            soften(relu, beta, first.device)
        for skip, place in zip(added, around, strict=True):
            skip.connect(place)
        self.module = model
        self.soft_skips = nn.ModuleList(added)
        self.soft_skips.train(model.training)
        self.training = model.training
        self.register_buffer("t", torch.zeros((), device=first.device))
        self.smoothing, self.until = smoothing, until
        self._t, self._soft, self._finished = 0.0, True, False
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        _log.info("Softened: %d ReLUs are soft, %d layers have a skip around them", len(soft), len(added))

    def at(self, progress: float) -> None:
        """Say where the training is: before each epoch, or each step.

        Args:
            progress: 0 to 1, epoch / epochs, say.

        Raises:
            ValueError: it is not.
            RuntimeError: after `finish`.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"Softened.at: progress must be 0 to 1, got {progress!r}")
        if self._finished:
            raise RuntimeError("Softened.at: finish has been called")
        self.t.fill_(min(1.0, progress / self.until))
        self._spread()

    def label_smoothing(self, classes: int) -> float:
        """What torch.nn.functional.cross_entropy wants as `label_smoothing` now: for the training loss only.

        With smoothing a of C classes the true one has the target 1 - a and the others a / (C - 1) each, at
        t = 0; torch's e = a C / (C - 1) is the same. At most everything is equally likely (e = 1).

        Raises:
            ValueError: fewer than two classes.
        """
        if classes < 2:
            raise ValueError(f"Softened.label_smoothing: classes must be at least 2, got {classes!r}")
        return min(1.0, self.smoothing * classes / (classes - 1)) * (1 - self._t)

    def added(self) -> list[nn.Parameter]:
        """The parameters of the skips, which are among `parameters()`: for a group of their own."""
        return list(self.soft_skips.parameters())

    def finish(self) -> nn.Module:
        """Hand back the model, without anything that this has put on it; at t = 1 its outputs stay the same.

        Before t = 1 they change, with a warning to the logger.

        Raises:
            RuntimeError: it has been handed back already.
        """
        if self._finished:
            raise RuntimeError("Softened.finish: has been called before")
        if self._t < 1:
            _log.warning(
                "Softened.finish: outputs change, for t is %.3g, not 1: until now the network still had its "
                "soft activations and skips", self._t,
            )  # fmt: skip
        disconnect(self.module)
        for module in self.module.modules():
            if isinstance(module, SoftReLU):
                harden(module)
        self.t.fill_(1)
        self._spread()
        self._finished = True
        return self.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model makes of these arguments."""
        output = self.module(*args, **kwargs)
        if self._soft or not len(self.soft_skips) or not torch.is_grad_enabled():
            return output
        # DDP waits for a gradient of every parameter: sums of no entries have one of zeros, even if there is
        # NaN in the parameters, and x - 0.0 is x for every x (-0.0 + 0.0 is not)
        nothing = torch.stack([parameter.flatten()[:0].sum() for parameter in self.added()]).sum()
        return tree_map(lambda leaf: _minus(leaf, nothing), output)

    def _spread(self) -> None:
        """Tell all parts the position that `t` has."""
        self._t = self.t.item()
        self._soft = self._t < 1  # forward looks at this: compiled code is for one value of what it looks at
        for module in self.modules():
            if isinstance(module, (SoftReLU, Skip)):
                module.at(self._t)


def _after_load(softened: Softened, incompatible: object) -> None:
    softened._spread()


def _minus(output: object, nothing: Tensor) -> object:
    if isinstance(output, Tensor) and output.requires_grad:
        return output - nothing.to(output)
    return output


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Softened: model must be a module, got {type(model).__name__}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "Softened: model must not be a DistributedDataParallel, which would leave out the skips: put it "
            "around Softened"
        )
    if any(isinstance(module, (Softened, SoftReLU)) for module in model.modules()) or connected(model):
        raise ValueError("Softened: model is softened already")

"""A mask that is learned with the weights, by terms of the loss that close it (arXiv 2312.01653, stage 2)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from drive.distributed.placement import is_dtensor
from drive.layers import Layers
from drive.targets.choice import Include
from drive.targets.targets import prunable
from drive.targets.wrappers import unwrap

_log = logging.getLogger(__name__)

Forward = Literal["expectation", "sample", "round"]


class LayerState(NamedTuple):
    """How far the mask of a weight has closed.

    Attributes:
        density: mean of p.
        open: share of the entries with p > 0.5.
        undecided: mean of p (1 - p), at most 0.25.
        penalty: its part of `LearnedMask.penalty`.
    """

    name: str
    entries: int
    density: float
    open: float
    undecided: float
    penalty: float


class LearnedMask(nn.Module):
    """A model whose prunable weights are multiplied by a mask that is learned with them.

    Each prunable entry has a logit s; p = sigmoid(s) is the probability that it is kept (the source's
    "probability of zeroing the weight" is 1 - p). The model computes with theta * m, and training adds
    `penalty()` to the loss, which pushes p down, and to 0 or 1. Then prune by |theta| * p, in one exact step,
    and take the model back:

        learned = LearnedMask(model)
        ... train: (loss_fn(learned(x), y) + learned.penalty()).backward(), with `learned.at(progress)` ...
        masks = drive.prune(learned, [], method="learned-mask", sparsity=0.99)
        model = learned.finish()

    Give the logits an optimizer of their own, Adam with a learning rate of 0.05 to 0.1 and no weight decay:
    their gradients are as small as 1 / n, and Adam does not mind. `logits()` are these, `weights()` the rest.

    The model is the child `module`, its names are what they were; `state_dict` holds it, the logits, and how
    far the training is. Wrap it before DistributedDataParallel or torch.compile: these go around.

    The source leaves open how p becomes a mask, and all numbers: these are arguments here. The penalties and
    the straight-through gradients are those of Srinivas et al., arXiv 1611.06694.

    Attributes:
        module: the model.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward = "expectation",
        straight_through: bool = True,
        *,
        start: float = 0.0,
        density: float = 3.0,
        undecided: float = 3.0,
        delay: float = 0.0,
        ramp: float = 0.0,
        include: Include | None = None,
        exclude: Include | None = None,
        layers: Layers | None = None,
    ):
        """
        Args:
            model: it is not copied.
            forward: m while training. "expectation": p. "sample": 0 or 1, 1 with probability p, drawn anew in
            forward: m in training. "expectation": p. "sample": 0 or 1, 1 with probability p, drawn anew in
                mode "sample" is p, the mean of what it draws.
            straight_through: theta gets the gradient of theta * m as if m were 1. Otherwise it fades where p
                does, and an entry that is 0 at first (`hadamard_init_`) is closed before it can grow.
            start: of the logits.
            density, undecided: factors of the penalties.
            delay, ramp: the part of the training, 0 to 1, before the penalties begin, and the part in which
                they grow to these factors (`at`).
            include, exclude, layers: which weights have logits, as in `fused_drive_prune`.

        Raises:
            ValueError: a number or name that is none of these; a model that is wrapped already.
            TypeError, ValueError: of `fused_drive_prune`, for the model and what is to be pruned of it.
        """
        super().__init__()
        _check(forward, {"density": density, "undecided": undecided, "delay": delay, "ramp": ramp})
        if unwrap(model) is not model:
            raise ValueError(
                f"LearnedMask: model must be what {type(model).__name__} wraps: wrap that, and it goes around"
            )
        weights = prunable(model, include, exclude, layers, op="LearnedMask")
        if sharded := next((name for name, weight in weights.items() if is_dtensor(weight)), None):
            raise ValueError(f"LearnedMask: {sharded} must be a plain tensor, got a DTensor")
        self.module = model
        self.kind, self.straight_through = forward, straight_through
        self.density, self.undecided, self.delay, self.ramp = density, undecided, delay, ramp
        places = {id(parameter): path for path, parameter in _reversed(model)}
        self._paths = {name: places[id(weight)] for name, weight in weights.items()}  # in the model as it is
        for name, weight in weights.items():
            dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
            self.register_parameter(_key(name), nn.Parameter(torch.full_like(weight, start, dtype=dtype)))
        self.register_buffer("_factor", torch.zeros((), device=next(iter(weights.values())).device))
        self._closed: set[str] = set()
        self._finished = False
        self.at(0.0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass with theta * m.

        Raises:
            RuntimeError: the model has been taken back.
        """
        self._check_unfinished()
        masked = {self._paths[name]: self._masked(name) for name in self._paths}
        return functional_call(self.module, masked, args, kwargs)

    def penalty(self) -> Tensor:
        """To be added to the loss: factor * (density * mean(p) + undecided * mean(p (1 - p))), a scalar.

        The means are over all prunable entries, so that it does not depend on the size of the network; the
        factor is 1 but for `delay` and `ramp`.
        """
        self._check_unfinished()
        return cast(Tensor, self._factor) * self._penalty(list(self._paths))

    def at(self, progress: float) -> None:
        """Say how far the training is, epoch / epochs, for the ramp; warns, once each, of layers that close.

        Raises:
            ValueError: not within 0 to 1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"LearnedMask: progress must be in [0, 1], got {progress}")
        begun = progress - self.delay
        factor = min(1.0, begun / self.ramp) if self.ramp and begun >= 0 else float(begun >= 0)
        cast(Tensor, self._factor).fill_(factor)
        probabilities = self.probabilities()
        kept = torch.stack(
            [p.sum() for p in probabilities.values()]
        ).tolist()  # the device is waited for once
        for (name, p), count in zip(probabilities.items(), kept, strict=True):
            if p.numel() and name not in self._closed and count < 1:
                self._closed.add(name)
                _log.warning(
                    "LearnedMask: %s closes: of its %d entries less than one is kept on average; begin later "
                    "(delay, ramp) or weaken the penalties (density, undecided)", name, p.numel(),
                )  # fmt: skip

    @torch.no_grad()
    def probabilities(self) -> dict[str, Tensor]:
        """p of every prunable weight by its name in the model, of its shape."""
        return {name: self._logit(name).sigmoid() for name in self._paths}

    def logits(self) -> list[nn.Parameter]:
        """The logits, in the order of the weights."""
        return [self._logit(name) for name in self._paths]

    def weights(self) -> list[nn.Parameter]:
        """All other parameters: those of the model."""
        return list(self.module.parameters())

    @torch.no_grad()
    def layer_states(self) -> list[LayerState]:
        """How far each layer's mask has closed."""
        found = []
        for name, p in self.probabilities().items():
            mean = float(p.mean()) if p.numel() else 0.0
            undecided = float((p * (1 - p)).mean()) if p.numel() else 0.0
            part = float(cast(Tensor, self._factor) * self._penalty([name]))
            found.append(LayerState(name, p.numel(), mean, _share(p > 0.5), undecided, part))
        return found

    @torch.no_grad()
    def finish(self, fold: bool = True) -> nn.Module:
        """The model back, alone.

        Args:
            fold: theta becomes theta * m, so that outputs are to the bit those of this wrapper in eval mode;
                False: theta stays.

        Raises:
            RuntimeError: it has been taken back before.
        """
        self._check_unfinished()
        if fold:
            for name, path in self._paths.items():
                weight = self.module.get_parameter(path)
                weight.copy_(_product(weight, self._mask(self._logit(name).sigmoid(), training=False)))
        self._finished = True
        return self.module

    def _masked(self, name: str) -> Tensor:
        weight, p = self.module.get_parameter(self._paths[name]), self._logit(name).sigmoid()
        mask = self._mask(p.detach(), self.training)
        return cast(Tensor, _Masked.apply(weight, p, mask, self.straight_through))

    def _mask(self, p: Tensor, training: bool) -> Tensor:
        if self.kind == "round":
            return (p >= 0.5).to(p.dtype)
        return torch.bernoulli(p) if self.kind == "sample" and training else p

    def _penalty(self, names: list[str]) -> Tensor:
        total = sum(self._logit(name).numel() for name in self._paths)
        parts = []
        for name in names:
            p = self._logit(name).sigmoid()
            parts.append((self.density * p + self.undecided * p * (1 - p)).sum() / max(total, 1))
        return torch.stack(parts).sum()

    def _logit(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[_key(name)])

    def _check_unfinished(self) -> None:
        if self._finished:
            raise RuntimeError("LearnedMask: finish() has taken the model back: use that")


class _Masked(torch.autograd.Function):
    """weight * mask; the gradient to p is that of weight * p, that to the weight may pass the mask by."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, p: Tensor, mask: Tensor, straight_through: bool) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.straight_through, ctx.dtype = straight_through, p.dtype
        return _product(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,), (weight, mask) = grads, ctx.saved_tensors
        to_weight = grad if ctx.straight_through else _product(grad, mask)
        return to_weight, grad.to(ctx.dtype) * weight.to(ctx.dtype), None, None


def _product(weight: Tensor, mask: Tensor) -> Tensor:
    """In the mask's precision, rounded once."""
    return (weight.to(mask.dtype) * mask).to(weight.dtype)


def _key(name: str) -> str:
    """Of a weight's logit among the wrapper's parameters, whose names may have no dots."""
    return "logit:" + name.replace(".", ":")


def _reversed(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Of tied parameters the first name is the last."""
    return list(model.named_parameters(remove_duplicate=False))[::-1]


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 0.0


def _check(forward: object, numbers: Mapping[str, float]) -> None:
    if forward not in ("expectation", "sample", "round"):
        raise ValueError(f"LearnedMask: forward must be 'expectation', 'sample' or 'round', got {forward!r}")
    fits: dict[str, Callable[[float], bool]] = {
        "density": lambda x: x >= 0, "undecided": lambda x: x >= 0, "delay": lambda x: 0 <= x <= 1,
        "ramp": lambda x: 0 <= x <= 1,
    }  # fmt: skip
    for name, value in numbers.items():
        if not fits[name](value):
            span = "at least 0" if name in ("density", "undecided") else "in [0, 1]"
            raise ValueError(f"LearnedMask: {name} must be {span}, got {value}")

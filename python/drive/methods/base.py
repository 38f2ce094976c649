"""What a method is: a name, how often it prunes, and the gradients that its score is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    """What a method may look at: the model with its prunable weights, fresh batches, the loss."""

    model: nn.Module
    weights: Mapping[str, Tensor]
    batches: Iterator[tuple[Any, Any]]
    loss_fn: LossFn

    def loss_gradients(self) -> dict[str, Tensor]:
        """dL/dtheta of the prunable weights on one fresh batch; `.grad` is not touched.

        Raises:
            ValueError: a prunable weight has no part in the loss.
        """
        inputs, targets = next(self.batches)
        with torch.enable_grad():
            loss = self.loss_fn(self.model(inputs), targets)
            grads = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        found: dict[str, Tensor] = {}
        for name, grad in zip(self.weights, grads, strict=True):
            if grad is None:
                raise ValueError(f"{name} has no gradient: the loss does not depend on it; exclude it")
            found[name] = grad
        return found


class Method(ABC):
    """Base of all methods: entries are kept by the largest |theta * gradient|.

    A method says how many iterations it takes and on what schedule unless the caller does, and
    what stands in the gradient's place at each.
    """

    name: ClassVar[str]
    iterations: int = 1
    schedule: str = "one_shot"

    @abstractmethod
    def gradients(self, problem: Problem) -> dict[str, Tensor]:
        """One tensor per prunable weight (its shape and dtype, any strides), for one iteration."""

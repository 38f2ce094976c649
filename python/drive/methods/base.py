"""What a method is: a name, how often it prunes, what it ranks entries by, and whether it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from drive._scoring.capture import GraphedGradients
from drive._scoring.gradients import LossGradients
from drive._scoring.loss import Batch, Loss, LossFn
from drive._scoring.sgd import Train
from drive.masks import Masks
from drive.schedules import Schedule
from drive.targets.outputs import Rows

Stage = Literal["initialisation", "warm-up", "training"]
Spread = Literal["no", "copies", "shards"]


@dataclass(frozen=True)
class Problem:
    """What a method may look at in one iteration: the model, its prunable weights, batches, the loss.

    Attributes:
        loss: (model, batch, temperature=1) -> scalar, whatever form the batches have.
        gradients_of: batch -> dL/dtheta, computed eagerly or by a CUDA graph.
        train: of `drive.prune`.
        accumulate: batches that one score takes.
        sparsity: the final one.
        iteration, iterations: this one, from 1, and how many there are.
        outputs: where the outputs of each weight are, if they are pruned as a whole (structure "channels").
        masks: those of the iterations before; None at the first one, if the caller gave none.
        notes: empty at first: what a method wants to remember from one iteration to the next goes here, and
            not on its instance, of which several runs may make use.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    batches: Iterator[Batch]
    loss: Loss
    gradients_of: LossGradients | GraphedGradients
    train: Train
    accumulate: int
    sparsity: float
    iteration: int
    iterations: int
    outputs: Mapping[str, Rows] | None = None
    masks: Masks | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def loss_fn(self) -> LossFn | None:
        """(outputs, targets) -> loss of `drive.prune`; None where the loss is another."""
        return self.loss.loss_fn

    def take(self) -> list[Batch]:
        """The fresh batches of one score."""
        return [next(self.batches) for _ in range(self.accumulate)]

    def loss_gradients(self, *, reuse: bool = False) -> dict[str, Tensor]:
        """dL/dtheta of the prunable weights, the mean over fresh batches; `.grad` is not touched.

        Args:
            reuse: the next call may overwrite the tensors, which saves copying them.

        Raises:
            ValueError: a prunable weight has no part in the loss.
        """
        found = self.gradients_of(next(self.batches))
        if self.accumulate == 1:
            if reuse or not self.gradients_of.overwrites:
                return found
            return {name: grad.clone() for name, grad in found.items()}
        names, found = list(found), dict(found)
        # copies, for two gradients may be one tensor; one after the other, for the model may hardly fit
        total = [found.pop(name).clone() for name in names]
        for _ in range(self.accumulate - 1):
            more = self.gradients_of(next(self.batches))
            torch._foreach_add_(total, [more[name] for name in names])
            del more
        torch._foreach_div_(total, self.accumulate)
        return dict(zip(names, total, strict=True))


@dataclass(frozen=True)
class Ranking:
    """What the entries are ranked by, the largest survive: one tensor per weight, of its shape.

    gradients: |theta * gradient|; with mask_gradients |theta * mask_gradient * gradient|, in float64. Of the
        weights' dtype, any strides. These scores are never in memory.
    scores: |score|, or with signed=True the score itself (in float32). Any floating dtype; overwritten.
    gates: [outputs] of each weight, float64: of structure "channels", whose units have |the sum over their
        outputs|.
    None of them: |theta|.

    power: the score is this power of what is ranked, which matters where scores are summed (blocks).
    revive: entries that were pruned compete again.
    """

    gradients: Mapping[str, Tensor] | None = None
    mask_gradients: Mapping[str, Tensor] | None = None
    scores: Mapping[str, Tensor] | None = None
    gates: Mapping[str, Tensor] | None = None
    signed: bool = False
    power: int = 1
    revive: bool = False


class Method(ABC):
    """Base of all methods.

    A method says how many iterations it takes and on what schedule unless the caller does, and what
    the entries are ranked by at each.

    Attributes:
        stage: when it prunes: at initialisation, after a dense warm-up (or a whole training), or in the
            course of a training of its own, by `Problem.train`, in `before`.
        scope: `drive.prune`'s, unless the caller says otherwise.
        accumulate: batches that one score takes, likewise.
        zero_means: what a score of 0 says, for the error where such scores decide.
        spread: whether the model may be spread over ranks: not at all, as copies (DDP), or also as shards.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = "warm-up"
    spread: ClassVar[Spread] = "shards"
    zero_means: ClassVar[str] = "the weight, or the gradient by it, is 0 (pruned before? masks= says where)"
    iterations: int = 1
    schedule: str | Schedule = "one_shot"
    scope: str = "global"
    accumulate: int = 1

    def iterations_to(self, sparsity: float, by_outputs: bool = False) -> int:
        """How many iterations it takes to a final sparsity, of entries or of outputs."""
        return self.iterations

    def before(self, problem: Problem) -> None:  # noqa: B027 (most methods do not train)
        """Train, before an iteration ranks."""

    @abstractmethod
    def rank(self, problem: Problem) -> Ranking:
        """What to rank by in one iteration. Buffers, modes and `.grad` come back afterwards."""

    def after(self, problem: Problem) -> None:  # noqa: B027
        """Called when an iteration's masks are applied; `problem.masks` are these."""

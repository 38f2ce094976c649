"""SynFlow (Tanaka et al., NeurIPS 2020, arXiv 2006.05467)."""

import copy

import torch
from torch import Tensor

from drive._scoring.loss import Batch, check_gradients_can_be_had, tensors_in
from drive.targets.wrappers import look_up, uncompiled, unwrap

from .base import Method, Problem, Ranking


class SynFlow(Method):
    """Score |theta * dR/dtheta|, R = sum of f(ones) for the network f of absolute parameters (Eq. 2).

    Needs no data: of a batch only the shape of an input is used. In 100 steps of exponential density, in
    eval mode, on a copy of the model in float64 (float32 overflows in deep networks) with the absolute
    values of all its parameters and buffers, BatchNorm's statistics included, as in the published code.
    """

    name = "synflow"
    zero_means = "the weight is 0, or no path through it has weights that are not"
    stage = "initialisation"
    spread = "copies"
    iterations = 100
    schedule = "exponential"

    def rank(self, problem: Problem) -> Ranking:
        check_gradients_can_be_had(self.name)
        inputs = _inputs(next(problem.batches))
        linear = copy.deepcopy(unwrap(problem.model)).double().eval()
        with torch.no_grad():
            for tensor in (*linear.parameters(), *linear.buffers()):
                if tensor.is_floating_point():
                    tensor.abs_()
        ones = torch.ones(1, *inputs.shape[1:], dtype=torch.float64, device=inputs.device)
        weights = look_up(self.name, linear, problem.weights)
        with torch.enable_grad():
            with uncompiled():
                outputs = tensors_in(linear(ones))
            if not outputs:
                raise ValueError("synflow: the model must return tensors in eval mode, got none")
            flow = torch.stack([output.sum() for output in outputs]).sum()
            grads = torch.autograd.grad(flow, list(weights.values()), allow_unused=True)
        scores = {}
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            if grad is None:
                raise ValueError(f"{name} has no gradient: the output does not depend on it; exclude it")
            scores[name] = weight.detach() * grad
        return Ranking(scores=scores)


def _inputs(batch: Batch) -> Tensor:
    """The one tensor that goes into the model, of (inputs, targets)."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    inputs = batch[0] if pair else batch
    if not pair or not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = inputs.dtype if isinstance(inputs, Tensor) and pair else type(inputs).__name__
        raise ValueError(
            "synflow: batches must be (inputs, targets) with one floating-point tensor as inputs, in place "
            f"of which it puts ones, got {got}: take another method"
        )
    return inputs

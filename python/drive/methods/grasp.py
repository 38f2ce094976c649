"""GraSP (Wang, Zhang and Grosse, ICLR 2020, arXiv 2002.07376)."""

import torch

from .base import Method, Problem, Ranking
from .second_order import hessian_times_gradient


class Grasp(Method):
    """Score theta * (H g), the largest survive: of the paper's -theta * (H g), Eq. 8, the largest go.

    Keeps what the gradient flow after pruning needs most. Meant for initialisation, one shot. The published
    code divides the logits by 200, so that the softmax is nearly flat, and takes 10 samples a class; it keeps
    the mode (train) that the model is in.

    Args:
        temperature: the model's outputs are divided by it before the loss.
    """

    name = "grasp"
    zero_means = (
        "the gradient flow does not change without the weight (it needs one above 0, and is better without "
        "one below 0)"
    )
    stage = "initialisation"
    spread = "no"  # autograd.grad goes round the averaging of gradients

    def __init__(self, temperature: float = 200.0):
        self.temperature = temperature

    def rank(self, problem: Problem) -> Ranking:
        products = hessian_times_gradient(self.name, problem, problem.take(), self.temperature)
        with torch.no_grad():
            scores = {name: w * products[name] for name, w in problem.weights.items()}
        return Ranking(scores=scores, signed=True)

"""CroP (Rachwan et al., ICML 2022, arXiv 2206.10451)."""

from .base import Method, Problem, Ranking
from .second_order import hessian_times_gradient


class Crop(Method):
    """Score |theta * (H g)|: unlike GraSP's the absolute value, at the temperature of the loss itself.

    Keeps the gradient flow as it is. In 102 steps that halve the distance to the final sparsity, scored again at
    each, in eval mode. The published code scores on the test data; this one on the batches that it is given.

    Args:
        batches: how many are summed in each step.
    """

    name = "crop"
    iterations = 102
    schedule = "halving"

    def __init__(self, batches: int = 5):
        self.batches = batches

    def rank(self, problem: Problem) -> Ranking:
        problem.model.eval()  # drive.prune puts the mode back
        batches = [next(problem.batches) for _ in range(self.batches)]
        return Ranking(hessian_times_gradient(problem, batches))

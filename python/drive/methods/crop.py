"""CroP (Rachwan et al., ICML 2022, arXiv 2206.10451)."""

from .base import Method, Problem, Ranking
from .second_order import hessian_times_gradient


class Crop(Method):
    """Score |theta * (H g)|: unlike GraSP's the absolute value, at the temperature of the loss itself.

    Keeps the gradient flow as it is. In 102 steps that halve the distance to the final sparsity, scored
    again at each on 5 batches (`accumulate`), in eval mode. The published code scores on the test data; this
    one on the batches that it is given.
    """

    name = "crop"
    zero_means = "the gradient flow does not change without the weight"
    spread = "no"  # autograd.grad goes round the averaging of gradients
    iterations = 102
    schedule = "halving"
    accumulate = 5

    def rank(self, problem: Problem) -> Ranking:
        problem.model.eval()  # drive.prune puts the mode back
        return Ranking(hessian_times_gradient(self.name, problem, problem.take()))

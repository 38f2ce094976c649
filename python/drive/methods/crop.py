"""CroP (Rachwan et al., ICML 2022, arXiv 2206.10451)."""

from .base import Method, Problem, Ranking
from .second_order import gate_sensitivities, hessian_times_gradient


class Crop(Method):
    """Score |theta * (H g)|: unlike GraSP's the absolute value, at the temperature of the loss itself.

    Keeps the gradient flow as it is. In 102 steps that halve the distance to the final sparsity, scored
    again at each on 5 batches (`accumulate`), in eval mode. The published code scores on the test data; this
    one on the batches that it is given.

    Of structure "channels", a unit has the score |d<g, dL/dtheta>/dc|, g held fixed, c a gate of value 1 that
    is multiplied to all of its outputs, after the biases and before any norm (Sec. 3.3), and the published
    code takes one step: `iterations=1`.
    """

    name = "crop"
    zero_means = "the gradient flow does not change without the weight"
    spread = "no"  # autograd.grad goes round the averaging of gradients
    iterations = 102
    schedule = "halving"
    accumulate = 5

    def iterations_to(self, sparsity: float, by_outputs: bool = False) -> int:
        return 1 if by_outputs else self.iterations

    def rank(self, problem: Problem) -> Ranking:
        problem.model.eval()  # drive.prune puts the mode back
        if problem.outputs is not None:
            gates = gate_sensitivities(self.name, problem, problem.outputs, problem.take())
            return Ranking(gates=gates)
        return Ranking(hessian_times_gradient(self.name, problem, problem.take()))

"""Magnitude pruning (Han et al., arXiv 1506.02626)."""

from torch import Tensor

from .base import Method, Problem


class Magnitude(Method):
    """Score |theta|, once, without data. Meant for a trained network."""

    name = "magnitude"

    def gradients(self, problem: Problem) -> dict[str, Tensor]:
        # ones of every shape that take one entry of memory: the op reads any strides
        return {name: w.new_ones(()).expand_as(w) for name, w in problem.weights.items()}

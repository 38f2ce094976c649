"""Magnitude pruning (Han et al., arXiv 1506.02626)."""

from .base import Method, Problem, Ranking


class Magnitude(Method):
    """Score |theta|, once, without data. Meant for a trained network."""

    name = "magnitude"
    zero_means = "the weight is 0 (pruned before? masks= says where)"

    def rank(self, problem: Problem) -> Ranking:
        return Ranking()

"""Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878)."""

from .base import Method, Problem, Ranking


class GradualMagnitude(Method):
    """Score |theta|, in the course of a training: a round, then the cubic schedule's next step (Eq. 1).

    A round (`drive.prune`'s `train`) is the training between two prunings, Delta t steps in the paper, so
    that n Delta t are `iterations` rounds; what remains of the training is the caller's, with the masks held.
    The paper prunes every layer alike (scope="uniform"); the default is global, as for the other methods.
    """

    name = "gradual"
    zero_means = "the weight is 0 (pruned before? masks= says where)"
    stage = "training"
    iterations = 20
    schedule = "cubic"

    def before(self, problem: Problem) -> None:
        problem.train(problem.model, problem.masks, problem.iteration - 1)

    def rank(self, problem: Problem) -> Ranking:
        return Ranking()

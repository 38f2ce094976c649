"""SNIP (Lee, Ajanthan and Torr, ICLR 2019, arXiv 1810.02340)."""

from .base import Method, Problem, Ranking


class Snip(Method):
    """Score |theta * dL/dtheta| (Eq. 6 of the paper, before its normalisation), once, on one batch.

    Meant for a network at its initialisation. With `iterations` > 1 it is iterative SNIP (de Jorge
    et al., arXiv 2006.09081). The original code scores biases too; this one, like the usual
    baselines, scores what `include` selects.
    """

    name = "snip"
    stage = "initialisation"

    def rank(self, problem: Problem) -> Ranking:
        return Ranking(problem.loss_gradients(reuse=True))

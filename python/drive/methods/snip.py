"""SNIP (Lee, Ajanthan and Torr, ICLR 2019, arXiv 1810.02340)."""

from torch import Tensor

from .base import Method, Problem


class Snip(Method):
    """Score |theta * dL/dtheta| (Eq. 6 of the paper, before its normalisation), once, on one batch.

    Meant for a network at its initialisation. With `iterations` > 1 it is iterative SNIP (de Jorge
    et al., arXiv 2006.09081). The original code scores biases too; this one, like the usual
    baselines, scores what `include` selects.
    """

    name = "snip"

    def gradients(self, problem: Problem) -> dict[str, Tensor]:
        return problem.loss_gradients(reuse=True)

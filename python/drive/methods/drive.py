"""DRIVE (Saikumar and Varghese, arXiv 2404.03687)."""

from torch import Tensor

from .base import Method, Problem


class Drive(Method):
    """Score |theta * dL/dm * dL/dtheta| (Eq. 6), a fresh batch and exponential density each iteration.

    With G = dL/d(theta*m), dL/dm = theta * G and dL/dtheta = m * G, so the score of a survivor is
    (theta * G)^2: its rank is that of |theta * G|, and one backward pass gives all of it
    (docs/method.md has the proof, and what then sets DRIVE apart from SNIP). The dense warm-up of
    Algorithm 1 (5 epochs in the paper, 1 on the larger data sets) is the caller's, before
    `drive.prune`.
    """

    name = "drive"
    iterations = 100
    schedule = "exponential"

    def gradients(self, problem: Problem) -> dict[str, Tensor]:
        return problem.loss_gradients(reuse=True)

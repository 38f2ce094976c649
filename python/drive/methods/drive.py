"""DRIVE (Saikumar and Varghese, arXiv 2404.03687)."""

from collections.abc import Sequence

import torch

from drive.targets.arguments import whole

from .base import Method, Problem, Ranking

# Exponents of |theta| and |G| in each term of the score, G = dL/d(theta * m)
TERMS = {"magnitude": (1, 0), "connection": (1, 1), "convergence": (0, 1)}


class Drive(Method):
    """Score |theta * dL/dm * dL/dtheta| (Eq. 6), a fresh batch and exponential density each iteration.

    With G = dL/d(theta*m), dL/dm = theta * G and dL/dtheta = m * G, so the score of a survivor is
    (theta * G)^2: its rank is that of |theta * G|, and one backward pass gives all of it
    (docs/method.md has the proof, and what then sets DRIVE apart from SNIP). The dense warm-up of
    Algorithm 1 (5 epochs in the paper, 1 on the larger data sets) is the caller's, before
    `drive.prune`.

    Args:
        terms: factors of the score, for ablations: "magnitude" |theta|, "connection" |dL/dm| (connection
            sensitivity), "convergence" |dL/dtheta| (convergence sensitivity).
        powers: (p, q) of a score |theta|^p * |G|^q instead: whole, 0 to 3, not both 0. All terms are (2, 2).
    """

    name = "drive"
    iterations = 100
    schedule = "exponential"

    def __init__(self, terms: Sequence[str] = tuple(TERMS), powers: tuple[int, int] | None = None):
        if unknown := [term for term in terms if term not in TERMS]:
            raise ValueError(f"Drive: terms must be among {', '.join(TERMS)}, got {unknown[0]!r}")
        chosen = [TERMS[term] for term in dict.fromkeys(terms)]
        p, q = powers or (sum(p for p, _ in chosen), sum(q for _, q in chosen))
        words = "whole, 0 to 3 and not both 0"
        p, q = (whole("Drive", "powers", power, 0, 3, words=words) for power in (p, q))
        if p == q == 0:
            raise ValueError(f"Drive: powers must be {words}, got {(p, q)}")
        self.powers = p, q

    def rank(self, problem: Problem) -> Ranking:
        p, q = self.powers
        if q == 0:  # |theta|^p ranks as |theta|
            return Ranking(power=p)
        grads = problem.loss_gradients(reuse=True)
        if p == 0:
            return Ranking(scores=grads, power=q)
        if p == q:  # without the square: it would underflow
            return Ranking(grads, power=p)
        if (p, q) == (2, 1):
            return Ranking(grads, mask_gradients=problem.weights)
        if (p, q) == (1, 2):
            return Ranking(grads, mask_gradients=grads)
        with torch.no_grad():  # six factors of float32 stay within float64's range
            weights = {name: w.double() for name, w in problem.weights.items()}
            return Ranking(scores={name: weights[name] ** p * g.double() ** q for name, g in grads.items()})

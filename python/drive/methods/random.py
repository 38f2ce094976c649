"""Random pruning: the baseline that every method should beat."""

import torch

from .base import Method, Problem, Ranking


class Random(Method):
    """Uniform noise as score, once; of drive.prune's seed."""

    name = "random"
    zero_means = "chance had it so"
    stage = "initialisation"
    spread = "copies"

    def rank(self, problem: Problem) -> Ranking:
        # float64: in a large model float32's 2^24 values would tie
        noise = {n: torch.rand_like(w, dtype=torch.float64) for n, w in problem.weights.items()}
        return Ranking(scores=noise)

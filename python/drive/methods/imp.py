"""Iterative magnitude pruning, the lottery ticket's (Frankle and Carbin, ICLR 2019, arXiv 1803.03635)."""

from math import ceil, log

import torch

from drive.targets.arguments import whole
from drive.targets.wrappers import unwrap

from .base import Method, Problem, Ranking


class Imp(Method):
    """Score |theta| of a trained network, level by level, the survivors reset after each.

    A level trains `rounds` rounds (of `drive.prune`'s `train`; the optimizer should be a new one in each
    level), prunes, and puts the whole network, biases and BatchNorm included, back to its initialisation, or
    with `rewind` to where it was after so many rounds (arXiv 1903.01611). Afterwards it is reset, ready for
    its training. The levels prune the same fraction of the survivors each, at most `fraction`, and end at the
    asked sparsity exactly; the paper's 20 % flat would overshoot it. `iterations` and `schedule` change that.

    Args:
        fraction: of the survivors that a level prunes at most.
        rounds: of training in a level.
        rewind: rounds of the first level after which the weights are those to go back to.
    """

    name = "imp"
    zero_means = "the weight is 0 (pruned before? masks= says where)"
    stage = "training"
    schedule = "exponential"

    def __init__(self, fraction: float = 0.2, rounds: int = 1, rewind: int = 0):
        if not 0 < fraction < 1:
            raise ValueError(f"Imp: fraction must be in (0, 1), got {fraction}")
        rounds, rewind = whole("Imp", "rounds", rounds, 1), whole("Imp", "rewind", rewind)
        if not rewind < rounds:
            raise ValueError(f"Imp: rewind must be in [0, rounds), got {rewind} of {rounds}")
        self.fraction, self.rounds, self.rewind = fraction, rounds, rewind

    def iterations_to(self, sparsity: float, by_outputs: bool = False) -> int:
        return max(1, ceil(log(1 - sparsity) / log(1 - self.fraction) - 1e-9))

    def before(self, problem: Problem) -> None:
        first = problem.iteration == 1
        for number in range(0 if first else self.rewind, self.rounds):
            if first and number == self.rewind:
                state = unwrap(problem.model).state_dict()
                problem.notes["start"] = {name: tensor.clone() for name, tensor in state.items()}
            problem.train(problem.model, problem.masks, number)

    def rank(self, problem: Problem) -> Ranking:
        return Ranking()

    @torch.no_grad()
    def after(self, problem: Problem) -> None:
        assert problem.masks is not None
        for name, tensor in unwrap(problem.model).state_dict().items():
            tensor.copy_(problem.notes["start"][name])
        problem.masks.apply_(problem.model)

"""Sparsity in every stage of training (arXiv 2312.01653): each piece works alone, and with every method."""

from .gradients import check_gradients as check_gradients
from .hadamard import hadamard_init_ as hadamard_init_
from .learned_mask import LearnedMask as LearnedMask
from .softened import Softened as Softened

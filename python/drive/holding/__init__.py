"""Masks held while a model trains: what keeps pruned weights at zero, and travels with the model."""

from .attachment import Attachment as Attachment
from .moments import register_optimizer as register_optimizer

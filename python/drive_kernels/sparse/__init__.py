"""Pruned layers on a CPU: convolutions and linear layers that compute with the non-zeros only."""

from . import blocked as blocked
from . import conv as conv
from . import engine as engine
from . import linear as linear
from . import pattern as pattern

"""Layer types: which of their parameters are weights, and along which axes they multiply."""

from .record import Weight as Weight
from .record import Weights as Weights
from .registry import Layers as Layers
from .registry import check_layers as check_layers
from .registry import fitting as fitting
from .registry import register_layer as register_layer
from .registry import weights_of as weights_of

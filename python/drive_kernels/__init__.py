"""The kernel layer: every op of the `drive` namespace, `torch.ops.drive.*`.

Each op's module defines the schema, the shape-only (fake) version and the reference in PyTorch. The
compiled part registers faster kernels for the same schemas when it is loaded; `build_error` says why it
is missing. Where it has no CUDA kernel, one in Triton serves, and where that is missing too, the reference:
`implementations` says of each what is wrong with it.
"""

from importlib import import_module
from types import ModuleType

from . import linear as linear
from . import memory as memory
from . import prune as prune
from . import registry
from . import sparse as sparse
from .registry import implementations

_C: ModuleType | None
build_error: str | None
try:
    _C, build_error = import_module("._C", __name__), None
except ImportError as error:
    _C, build_error = None, str(error)
registry.complete(build_error)

__all__ = ["build_error", "implementations", "linear", "memory", "prune", "sparse"]

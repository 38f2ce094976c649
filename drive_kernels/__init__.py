"""The kernel layer: every op of the `drive` namespace, `torch.ops.drive.*`.

Each op's module defines the schema, the shape-only (fake) version and the reference in PyTorch. The
compiled part registers faster kernels for the same schemas when it is loaded; without it the
references serve, and `build_error` says why it is missing.
"""

from importlib import import_module
from types import ModuleType

from . import prune as prune

_C: ModuleType | None
build_error: str | None
try:
    _C, build_error = import_module("._C", __name__), None
except ImportError as error:
    _C, build_error = None, str(error)

__all__ = ["build_error", "prune"]

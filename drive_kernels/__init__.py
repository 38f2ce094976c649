"""The kernel layer: every op of the `drive` namespace, `torch.ops.drive.*`.

Each op's module defines the schema, the shape-only (fake) version and the reference in PyTorch. The
compiled part registers faster kernels for the same schemas when it is loaded; without it the
references serve, and `build_error` says why it is missing.
"""

from types import ModuleType

from . import prune as prune

build_error: str | None = None
_C: ModuleType | None = None
try:
    from . import _C as _compiled  # type: ignore[attr-defined, unused-ignore]

    _C = _compiled
except ImportError as error:
    build_error = str(error)

__all__ = ["build_error", "prune"]

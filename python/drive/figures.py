"""Figures that belong to no window system, in files that are whole at any moment."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .files import write_atomic


def figure_of(width: float, height: float) -> Any:
    """A matplotlib figure, in inches. ImportError without matplotlib, which nothing else here needs."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """`write_atomic` of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())

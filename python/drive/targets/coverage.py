"""What is pruned of a model, and what is not, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from drive.layers import Layers

from .candidates import Candidate, candidates, matrices
from .choice import Include, chosen


@dataclass(frozen=True)
class Row:
    """A parameter, or with `reason` all that share it.

    Attributes:
        name: of the parameter; of several the first one.
        tensors, entries: how many.
        reason: why it is not pruned; empty if it is.
    """

    name: str
    tensors: int
    entries: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Which parameters of a model are pruned.

    Attributes:
        rows: the pruned ones, one by one; the others by reason, the largest first.
        matrices: entries of all trainable parameters of two dimensions and more, embeddings aside.
    """

    rows: tuple[Row, ...]
    matrices: int

    @property
    def pruned(self) -> int:
        """Entries that are looked at."""
        return sum(row.entries for row in self.rows if not row.reason)

    @property
    def total(self) -> int:
        """Entries of all parameters."""
        return sum(row.entries for row in self.rows)

    @property
    def share(self) -> float:
        """Of the trainable matrices, embeddings aside, that are looked at (1.0 if there are none)."""
        return min(1.0, self.pruned / self.matrices) if self.matrices else 1.0

    def __str__(self) -> str:
        """A table: tensors, entries, share of all, what."""
        lines = [f"{'tensors':>8} {'entries':>15} {'share':>7}"]
        for row in self.rows:
            name = row.name + ", ..." * (row.tensors > 1)
            what = f"not pruned: {row.reason} ({name})" if row.reason else name
            share = row.entries / max(self.total, 1)
            lines.append(f"{row.tensors:>8,} {row.entries:>15,} {share:>7.2%}  {what}")
        of_matrices = f"{self.share:.2%} of the trainable matrices, embeddings aside"
        return "\n".join([*lines, f"pruned: {self.pruned:,} of {self.total:,} parameters, {of_matrices}"])


def coverage(
    model: nn.Module,
    include: Include | None = None,
    exclude: Include | None = None,
    layers: Layers | None = None,
) -> Coverage:
    """Which parameters of a model are pruned by default, or by these arguments, and why the others are not.

    `print` it. Weights on the meta device will do: only shapes and types are looked at.

    Args:
        model, include, exclude, layers: as in `fused_drive_prune`.
    """
    found = candidates(model, layers, op="coverage")
    ids = {id(tensor) for tensor in chosen(model, include, exclude, layers, "coverage").tensors.values()}
    rows = [Row(c.name, 1, c.tensor.numel(), "") for c in found if id(c.tensor) in ids]
    others: dict[str, list[Candidate]] = {}
    for c in found:
        if id(c.tensor) not in ids:
            others.setdefault(c.reason or "excluded", []).append(c)
    left = [
        Row(some[0].name, len(some), sum(c.tensor.numel() for c in some), reason)
        for reason, some in others.items()
    ]
    return Coverage((*rows, *sorted(left, key=lambda row: -row.entries)), matrices(found))

"""What `convert` measured and chose."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

_KEY = "_drive_sparse_report"


@dataclass(frozen=True)
class Choice:
    """One layer: what was measured (seconds a call) or estimated, what was chosen, and why."""

    name: str
    shape: tuple[int, ...]  # of the weight
    input: tuple[int, ...]
    density: float
    seconds: dict[str, float]
    chosen: str
    why: str


@dataclass(frozen=True)
class Report:
    """All layers, and the whole model (seconds a call) in each way that was tried."""

    choices: list[Choice]
    whole: dict[str, float] = field(default_factory=dict)
    chosen: str = "dense"

    def __str__(self) -> str:
        kinds = list(dict.fromkeys(kind for choice in self.choices for kind in choice.seconds))
        width = max([len(choice.name) for choice in self.choices] + [5])
        head = "".join(f"{kind + ' ms':>{len(kind) + 5}}" for kind in kinds)
        lines = [f"{'layer':<{width}}  {'weight':>16}  {'density':>7}{head}  chosen"]
        for choice in self.choices:
            cells = "".join(
                f"{choice.seconds[kind] * 1e3:>{len(kind) + 5}.3f}"
                if kind in choice.seconds
                else " " * (len(kind) + 5)
                for kind in kinds
            )
            shape = "x".join(map(str, choice.shape))
            why = f" ({choice.why})" if choice.why else ""
            lines.append(
                f"{choice.name:<{width}}  {shape:>16}  {choice.density:7.4f}{cells}  {choice.chosen}{why}"
            )
        whole = ", ".join(f"{way} {seconds * 1e3:.2f} ms" for way, seconds in self.whole.items())
        return "\n".join([*lines, f"whole model: {self.chosen}" + (f" ({whole})" if whole else "")])


def attach(model: nn.Module, found: Report) -> None:
    """Remember a report with the model that it is about."""
    model.__dict__[_KEY] = found


def report(converted: nn.Module) -> Report:
    """What `drive.sparse.convert` chose for this model; print it for a table.

    Raises:
        ValueError: the model does not come from `convert`.
    """
    found = converted.__dict__.get(_KEY)
    if not isinstance(found, Report):
        raise ValueError("report: model must come from drive.sparse.convert, got another one")
    return found

"""What `convert` measured and chose."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from drive.figures import figure_of, save_figure

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

    @property
    def best_dense(self) -> float:
        """Seconds of the fastest dense candidate."""
        return min(seconds for kind, seconds in self.seconds.items() if kind.startswith("dense"))


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

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def draw(self, path: Path, title: str = "") -> None:
        """PNG: how many times faster than the best dense form each candidate is, layer by layer.

        Args:
            path: of the file, which is whole at any moment.
            title: of the figure, before the whole model's speed-up.

        Raises:
            ValueError: nothing was measured.
            ImportError: matplotlib is not installed.
        """
        layers = [choice for choice in self.choices if choice.seconds]
        if not layers:
            raise ValueError("draw: report must be of a measured model, got one without times")
        figure = figure_of(8.0, 1.6 + 0.28 * len(layers))
        axes = figure.subplots()
        kinds = dict.fromkeys(kind for choice in layers for kind in choice.seconds)
        for index, kind in enumerate(kinds):
            found = [(i, c.best_dense / c.seconds[kind]) for i, c in enumerate(layers) if kind in c.seconds]
            axes.plot([x for _, x in found], [y for y, _ in found], "o", color=f"C{index}", label=kind)
        chosen = [(i, c.best_dense / c.seconds[c.chosen]) for i, c in enumerate(layers)]
        axes.plot(
            [x for _, x in chosen], [y for y, _ in chosen], "ko", markersize=11, mfc="none", label="chosen"
        )
        axes.axvline(1, color="black", linestyle="--", linewidth=0.9)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("times faster than the best dense form")
        axes.set_yticks(range(len(layers)), [f"{c.name} ({1 - c.density:.1%})" for c in layers], fontsize=8)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        whole = f"whole model: {self.chosen}"
        if self.whole:
            dense = min(s for way, s in self.whole.items() if way.startswith("dense"))
            whole += f", {dense / self.whole[self.chosen]:.2f}x"
        axes.set_title(" - ".join(filter(None, (title, whole))), fontsize=10)
        save_figure(figure, path)


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

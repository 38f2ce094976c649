"""What `drive pipeline` trains: stages on or off, networks and data, and the methods beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from drive.experiments.paper.variants import Variant
from drive.experiments.training.recipe import Recipe


@dataclass(frozen=True)
class Stages:
    """Which of the source's four stages differ from ordinary training.

    Attributes:
        init: `hadamard_init_`, else torch's own.
        mask: a learned mask before pruning, else dense training; pruned by |theta| p, else by |theta|.
        smooth: label smoothing and soft activations after pruning.
        skips: soft skips after pruning.
    """

    init: bool = False
    mask: bool = False
    smooth: bool = False
    skips: bool = False

    @property
    def name(self) -> str:
        """As options and tables have it: "none", "mask", "init+mask", "all"."""
        on = [name for name, value in asdict(self).items() if value]
        return {0: "none", 4: "all"}.get(len(on), "+".join(on))

    @classmethod
    def named(cls, name: str) -> Stages:
        """
        Raises:
            KeyError: no such name.
        """
        return {stages.name: stages for stages in ALL}[name]


ALL = [Stages(*values) for values in product((False, True), repeat=4)]


@dataclass(frozen=True)
class MaskOptions:
    """How a mask is learned: arguments of `LearnedMask`, and the learning rate of its logits (Adam)."""

    forward: str = "expectation"
    straight_through: bool = True
    density: float = 3.0
    undecided: float = 3.0
    delay: float = 0.0
    ramp: float = 0.0
    lr: float = 0.1

    @property
    def name(self) -> str:
        return f"{self.forward}, through {'theta' if self.straight_through else 'theta m'}"


FORWARDS = [
    MaskOptions(forward, straight)
    for forward, straight in product(("expectation", "sample", "round"), (True, False))
]


@dataclass(frozen=True)
class Row:
    """A network on a data set.

    Attributes:
        recipe: of each of the two trainings, before and after pruning; those of one training have the same
            epochs in all.
        keep: shares of the prunable weights that stay.
        stages: those of the ablation.
        baselines: names of methods, or "dense".
        warmup: of DRIVE, in epochs.
        limit: training images. None: all.
        small: so that all ways to learn a mask can be compared, too (`--forwards`).
    """

    name: str
    data: str
    model: str
    recipe: Recipe
    keep: tuple[float, ...]
    stages: tuple[Stages, ...]
    baselines: tuple[str, ...]
    warmup: int
    limit: int | None = None
    small: bool = False

    @property
    def whole(self) -> Recipe:
        """The training of a method that has no stage before pruning."""
        return replace(self.recipe, epochs=2 * self.recipe.epochs)

    def variant(self, method: str) -> Variant:
        """A method, with the epochs of all; those at initialisation score in eval mode, as is published."""
        epochs = self.whole.epochs
        if method == "rigl":
            return Variant(method, method, iterations=max(1, epochs * 3 // 4) + 1)
        if method == "drive":
            return Variant(method, method, warmup=self.warmup)
        return Variant(method, method, eval_mode=True)

    def scaled(self, scale: float) -> Row:
        """The same in a fraction of the epochs."""
        return replace(self, recipe=self.recipe.scaled(scale), warmup=max(1, round(self.warmup * scale)))

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "recipe": self.recipe.as_dict()}


METHODS = ("snip", "grasp", "synflow", "drive", "rigl")
_PART = tuple(map(Stages.named, ("none", "mask", "init", "init+mask", "all")))
_MLP = Recipe(20, lr=0.05, batch_size=64)
_VGG = Recipe(80, lr=0.05)

ROWS = {
    row.name: row
    for row in (
        Row(
            "digits-mlp", "digits", "mlp", _MLP, (0.1, 0.01, 0.003), tuple(ALL), METHODS, warmup=5,
            small=True,
        ),
        Row(
            "mnist-mlp", "mnist", "mlp", _MLP, (0.1, 0.01, 0.003, 0.001), tuple(ALL), METHODS, warmup=2,
            small=True,
        ),
        Row(
            "cifar10-vgg16", "cifar10", "vgg16_bn", _VGG, (0.1, 0.01, 0.003, 0.001), _PART, METHODS, warmup=5,
        ),
        Row(
            "cifar10-vgg16-narrow", "cifar10", "vgg16_narrow", replace(_VGG, epochs=10), (0.05, 0.01), _PART,
            ("drive", "rigl"), warmup=2, limit=10_000,
        ),
    )
}  # fmt: skip

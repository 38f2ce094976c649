"""The tables of arXiv 2404.03687: what is published, and how each row is trained and pruned.

Accuracies are top-1 on the test images in %, means of three runs; seconds of pruning are on an RTX A6000 and
all that comes before the sparse network is trained. What the paper does not say is a choice of ours:

- momentum 0.9, weight decay 5e-4 (in Adam too, added to the gradient), crops at random with a padding of 4
  pixels, flips, and BatchNorm as torchvision has it: the fields of `Recipe`;
- the cosine falls step by step;
- a level of IMP goes through the whole schedule of the learning rate in its 20 epochs, and the levels prune
  the same fraction of the survivors each;
- SNIP scores one batch, of the size that training has; VGG-16 is the one with BatchNorm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from drive.experiments.training.recipe import Constant, Cosine, OneCycle, Recipe, Steps


class Published(NamedTuple):
    """One method's line in a row of the paper."""

    accuracy: dict[float, float]  # in %, by sparsity
    seconds: float  # of pruning


@dataclass(frozen=True)
class Row:
    """A network on a data set: how it is trained and pruned, and what the paper has on it."""

    data: str
    model: str
    recipe: Recipe
    sparsities: tuple[float, ...]
    warmup: int  # dense epochs before DRIVE prunes
    levels: int  # of IMP
    level_epochs: int
    unpruned: float | None  # %, published
    published: dict[str, Published]

    @property
    def name(self) -> str:
        return f"{self.data}-{self.model}"


# data, model, unpruned, method, accuracies at the sparsities, seconds of pruning. The two lines of SNIP on
# Tiny ImageNet are equal in the source; SynFlow is not there on some ResNets.
_TABLE1 = """
cifar10       alexnet   84.20  imp      85.76  83.58  80.57  76.24   24e3
cifar10       alexnet   84.20  snip     83.09  79.95  72.95  58.35   3
cifar10       alexnet   84.20  synflow  86.37  84.02  78.61  66.64   4
cifar10       alexnet   84.20  drive    86.97  87.21  85.37  74.49   220
cifar10       vgg16_bn  92.40  imp      91.61  90.20  90.04  88.35   12e3
cifar10       vgg16_bn  92.40  snip     92.56  92.01  91.31  10.00   2
cifar10       vgg16_bn  92.40  synflow  91.32  90.44  89.79  87.63   3
cifar10       vgg16_bn  92.40  drive    92.80  92.68  91.36  89.77   260
cifar10       resnet18  93.70  imp      91.79  90.81  90.71  88.66   21e3
cifar10       resnet18  93.70  snip     93.56  92.03  89.66  84.56   2
cifar10       resnet18  93.70  synflow  91.05  90.23  88.74  82.62   3
cifar10       resnet18  93.70  drive    93.59  92.14  89.86  85.90   270
cifar100      vgg16_bn  65.50  imp      65.80  65.50  63.60  61.20   12.6e3
cifar100      vgg16_bn  65.50  snip     65.11  64.06  56.78  1.00    2
cifar100      vgg16_bn  65.50  synflow  63.72  63.02  61.45  54.24   3
cifar100      vgg16_bn  65.50  drive    65.05  64.36  61.58  59.70   290
cifar100      resnet18  66.50  imp      64.44  63.81  61.94  61.08   22e3
cifar100      resnet18  66.50  snip     64.05  62.90  58.38  33.97   2
cifar100      resnet18  66.50  drive    64.34  63.01  60.30  57.44   320
tinyimagenet  vgg16_bn  48.74  imp      47.85  46.79  44.26  36.26   63e3
tinyimagenet  vgg16_bn  48.74  snip     44.45  39.51  33.21  16.85   2
tinyimagenet  vgg16_bn  48.74  synflow  47.23  43.03  40.46  30.86   4
tinyimagenet  vgg16_bn  48.74  drive    48.29  45.60  42.25  37.97   160
tinyimagenet  resnet18  49.41  imp      46.01  44.54  42.35  40.70   119e3
tinyimagenet  resnet18  49.41  snip     44.45  39.51  33.21  16.85   2
tinyimagenet  resnet18  49.41  drive    45.32  43.89  42.79  33.01   190
"""
_TABLE2 = """
imagenet32    resnet18  54.11  imp      48.30  45.58  40.21  33.94   428.5e3
imagenet32    resnet18  54.11  snip     48.90  45.51  36.62  21.83   3
imagenet32    resnet18  54.11  synflow  48.39  45.74  39.38  31.27   4
imagenet32    resnet18  54.11  drive    49.33  46.49  40.97  33.16   493
"""

_TINY = Recipe(100, 0.01, schedule=Steps(((30, 0.1), (60, 0.1), (80, 0.1)), 100))
_RECIPES = {
    "cifar10-alexnet": Recipe(50, 1e-4, 256, "adam", Constant()),
    "cifar10-vgg16_bn": Recipe(150, 0.01, schedule=Steps(tuple((at, 0.2) for at in (30, 60, 90, 120)), 150)),
    "cifar10-resnet18": Recipe(200, 0.01, schedule=Cosine()),
    "cifar100-vgg16_bn": Recipe(200, 0.01, schedule=Steps(((60, 0.2), (120, 0.2), (160, 0.2)), 200)),
    "cifar100-resnet18": Recipe(200, 0.01, schedule=Steps(((80, 0.1), (120, 0.01)), 200)),
    "tinyimagenet-vgg16_bn": _TINY,
    "tinyimagenet-resnet18": _TINY,
    "imagenet32-resnet18": Recipe(100, 0.1, 256, schedule=Steps(((30, 0.1), (60, 0.1), (80, 0.1)), 100)),
}


def _rows(table: str, sparsities: tuple[float, ...]) -> list[Row]:
    """The rows of a table as it is written down above."""
    found: dict[str, Row] = {}
    for line in table.strip().splitlines():
        data, model, unpruned, method, *accuracies, seconds = line.split()
        large = data in ("tinyimagenet", "imagenet32")
        name = f"{data}-{model}"
        row = found.setdefault(name, Row(
            data, model, _RECIPES[name], sparsities, warmup=1 if large else 5, levels=50, level_epochs=20,
            unpruned=float(unpruned), published={},
        ))  # fmt: skip
        values = dict(zip(sparsities, map(float, accuracies), strict=True))
        row.published[method] = Published(values, float(seconds))
    return list(found.values())


SPARSITIES = (0.9, 0.95, 0.98, 0.993)
TABLE1 = _rows(_TABLE1, SPARSITIES)
TABLE2 = _rows(_TABLE2, (0.7, 0.8, 0.9, 0.95))

# Not of the paper: networks that machines without a GPU can train, with a recipe that does them good
SMALL = [
    Row("cifar10", model, Recipe(60, lr, schedule=OneCycle()), SPARSITIES, warmup=10, levels=20,
        level_epochs=10, unpruned=None, published={})
    for model, lr in (("cnn4", 0.1), ("resnet8", 0.1), ("mlp", 0.05))
]  # fmt: skip

ROWS = {row.name: row for row in (*TABLE1, *TABLE2, *SMALL)}
METHODS = ("imp", "snip", "synflow", "drive")

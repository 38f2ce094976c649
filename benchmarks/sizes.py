"""How large everything is that `pytest benchmarks/` times."""

from __future__ import annotations

from dataclasses import dataclass

from drive.experiments.bench import step as bench
from drive.experiments.bench.workload import Shapes

BATCH = 32  # images or rows


@dataclass(frozen=True)
class Size:
    """What each benchmark prunes: about as many weights, or a layer of a network that has them."""

    shapes: Shapes  # of a step
    hidden: int  # units in each of the two hidden layers of the MLP that the loop prunes
    iterations: int  # of that loop
    linear: tuple[int, int]  # inputs, outputs
    conv: tuple[int, int]  # channels, side of the image
    width: int  # of the decoder
    heads: int
    blocks: int
    tokens: int  # in a sequence
    sequences: int


SIZES = {
    "tiny": Size(  # for the tests
        shapes=[(40, 30), (7,), (16, 8, 3, 3)], hidden=16, iterations=5, linear=(64, 32), conv=(8, 4),
        width=32, heads=2, blocks=1, tokens=8, sequences=2,
    ),
    "11M": Size(  # ResNet-18
        shapes=bench.SIZES["11M"], hidden=2848, iterations=100, linear=(4096, 4096), conv=(256, 8),
        width=384, heads=6, blocks=6, tokens=128, sequences=4,
    ),
    "138M": Size(  # VGG-16
        shapes=bench.SIZES["138M"], hidden=11_264, iterations=100, linear=(25_088, 4096), conv=(512, 14),
        width=1024, heads=16, blocks=11, tokens=1024, sequences=8,
    ),
}  # fmt: skip

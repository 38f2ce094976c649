"""How large everything is that `pytest benchmarks/` times."""

from __future__ import annotations

from dataclasses import dataclass

from drive import bench
from drive.workload import Shapes

BATCH = 32  # images or rows


@dataclass(frozen=True)
class Size:
    """Each benchmark's own, of about as many weights, but for single layers: those are of such a network."""

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
    # for the tests, in seconds
    "tiny": Size([(40, 30), (7,), (16, 8, 3, 3)], 16, 5, (64, 32), (8, 4), 32, 2, 1, 8, 2),
    # ResNet-18
    "11M": Size(bench.SIZES["11M"], 2848, 100, (4096, 4096), (256, 8), 384, 6, 6, 128, 4),
    # VGG-16
    "138M": Size(bench.SIZES["138M"], 11_264, 100, (25_088, 4096), (512, 14), 1024, 16, 11, 1024, 8),
}

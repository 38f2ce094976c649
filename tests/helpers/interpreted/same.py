"""Is a step of the Triton kernels in the interpreter the reference's? With chunks small enough for small
inputs to take every way through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from ahead_of_time import patch_once
from torch import Tensor
from ugly import Step, copy, memory

from drive_kernels.library import references
from drive_kernels.prune.triton import host, launch
from drive_kernels.prune.triton.host import Tuning
from drive_kernels.prune.triton.tables import PLACE, SELECTION

SMALL = Tuning(
    chunk=512, programs=3, small_sample=256, large_sample=512, samples_a_program=64, large_from=4000,
    entries_a_listed_key=2, listed_at_once=64,
)  # fmt: skip
TUNINGS = {
    "small": SMALL,
    "list too short": SMALL._replace(entries_a_listed_key=1 << 20, least_listed=5),
    "narrow bracket": SMALL._replace(sigmas=0.0),
}
PLACES = {0: "on high", 1: "on low", 2: "inside", 3: "anywhere"}


patch_once()


@contextmanager
def spoiled(step: Step) -> Iterator[None]:
    """Has meanwhile no gradients, and of the old masks nothing. What is written of the masks stays."""
    held = [(tensor, copy(tensor)) for tensor in step.grads + step.mask_grads]
    masks = [(mask.view(torch.uint8), copy(mask).view(torch.uint8)) for mask in step.masks]
    for tensor, _ in held:
        tensor.fill_(torch.nan)
    for mask, _ in masks:
        mask.fill_(2)
    yield
    for tensor, before in held:
        tensor.copy_(before)
    for mask, before in masks:
        mask.copy_(torch.where(mask == 2, before, mask))


BY = ("apply_bits", "apply_keys")


def assert_same(step: Step, tuning: Tuning = SMALL, by: str | None = None) -> str:
    """Every byte is the reference's. Returns where the threshold lay. `by`: the one of the two kernels that
    applies to plain chunks; the other does not run, and gradients and old masks are hidden from the bits'."""
    made = []
    launch_kernel = launch.launch_kernel

    def launch_one(kernel, grid, **arguments) -> None:
        name = kernel.fn.__name__
        if name not in BY or by is None or name == by == "apply_keys":
            launch_kernel(kernel, grid, **arguments)
        elif name == by:
            with spoiled(ours):
                launch_kernel(kernel, grid, **arguments)

    on_device = host.on_device

    def keep(*arguments) -> Tensor:
        made.append(on_device(*arguments))
        return made[0]

    ours, theirs = step.to("cpu"), step.to("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "TUNING", tuning)
        patch.setattr(host, "on_device", keep)
        patch.setattr(launch, "launch_kernel", launch_one)
        kept, nonfinite, scores = getattr(launch, step.op)(*ours.args())
    expected = references[step.op](*theirs.args())
    for name in ("weights", "grads", "mask_grads", "masks"):
        for index, pair in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True)):
            assert torch.equal(*map(memory, pair)), f"{name}[{index}]"
    assert torch.equal(kept, expected[0])
    assert torch.equal(nonfinite, expected[1])
    # float64 sums in another order
    torch.testing.assert_close(scores, expected[2], rtol=1e-12, atol=0, equal_nan=True)
    return PLACES[made[0][made[0][SELECTION.value] + PLACE.value].item()]

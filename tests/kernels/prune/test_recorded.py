"""drive::prune_ on CPU returns what was recorded, to the bit: masks, weights, counts, scores and their sum.

Inputs are made of integers, so that they are the same on every processor and with every version.
`python tests/kernels/prune/test_recorded.py` records anew.
"""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import drive_kernels  # noqa: F401  (defines torch.ops.drive)

RECORDED = Path(__file__).with_name("recorded.json")

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "small": [(7,), (64, 3, 3, 3), (0,), (130, 65)],
    "tails": [(4097,), (3, 4095), (1,), (64,)],
    "many": [(300, 200), (128, 64, 3, 3), (1000,)],
}
DTYPES = {
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "float16": [torch.float16],
    "float64": [torch.float64],
    "mixed": [torch.float32, torch.float16, torch.bfloat16],
}
SCORES = ("spread", "ties", "half zero", "equal", "denormal", "infinite")
LAYOUTS = ("contiguous", "unaligned", "channels last", "every second")
# how much is pruned, min_keep, are masks new, are there mask gradients
CALLS = ((0.9, 0, True, False), (0.5, 0, False, False), (0.97, 40, True, False), (0.8, 3, False, True))
CASES = [
    (shapes, dtype, scores, LAYOUTS[i % 4], CALLS[i // 4 % 4])
    for i, (shapes, dtype, scores) in enumerate(product(SHAPES, DTYPES, SCORES))
]


def integers(n: int, seed: int) -> Tensor:
    """Of 24 bits, evenly spread."""
    mixed = (torch.arange(n) + 1000003 * seed) * 6364136223846793005 + 1442695040888963407
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed >> 33) & 0xFFFFFF


def values(shape: tuple[int, ...], seed: int, scores: str, gradient: bool) -> Tensor:
    """float64, each a small integer times a power of two."""
    numbers = integers(torch.Size(shape).numel(), seed)
    signed = (numbers & 0xFFF) - 2048
    scale = {"ties": 0, "denormal": -66}.get(scores)
    exponents = -(numbers >> 12 & 7) if scale is None else torch.full_like(numbers, scale)
    if scores == "ties":
        signed = signed >> 9
    if scores == "equal":
        signed, exponents = torch.ones_like(signed), torch.zeros_like(exponents)
    if scores == "half zero" and gradient:
        signed = signed * (numbers >> 20 & 1)
    found = torch.ldexp(signed.double(), exponents)
    if scores == "infinite" and gradient and found.numel() > 60:
        found[[7, 59]] = torch.tensor([torch.inf, torch.nan], dtype=torch.float64)
    return found.view(shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "channels last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    step = 2 if layout == "every second" else 1
    room = tensor.new_zeros(3 + step * tensor.numel())
    begin = 3 if layout == "unaligned" else 0
    view = room[begin : begin + step * tensor.numel() : step].view(tensor.shape)
    return view.copy_(tensor)


def result(case: tuple) -> list[object]:
    shapes, dtype, scores, layout, (pruned, min_keep, fresh, three) = case
    tensors: list[list[Tensor]] = [[], [], []]
    masks = []
    for i, shape in enumerate(SHAPES[shapes]):
        kind = DTYPES[dtype][i % len(DTYPES[dtype])]
        for operand, some in enumerate(tensors):
            some.append(laid_out(values(shape, 3 * i + operand, scores, operand == 1).to(kind), layout))
        old = integers(torch.Size(shape).numel(), 100 + i).view(shape) % 3 > 0
        masks.append(laid_out(torch.zeros_like(old) if fresh else old, layout))
    weights, grads, mask_grads = tensors
    prune = round(pruned * sum(weight.numel() for weight in weights))
    kept, nonfinite, numbers = torch.ops.drive.prune_(
        weights, grads, mask_grads if three else [], masks, fresh, prune, min_keep
    )
    digest = hashlib.sha256()
    for tensor in (*weights, *masks):
        raw = torch.cat([tensor.reshape(-1)]).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    found = [float(number).hex() for number in numbers]
    return [digest.hexdigest()[:24], kept.tolist(), nonfinite.tolist(), found]


@pytest.mark.parametrize("threads", (1, 2))
def test_same_bits_as_recorded(threads: int):
    recorded = json.loads(RECORDED.read_text())
    assert len(recorded) == len(CASES)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for case, expected in zip(CASES, recorded, strict=True):
            assert result(case) == expected, case
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(result(case)) for case in CASES)
    RECORDED.write_text(f"[\n{lines}\n]\n")

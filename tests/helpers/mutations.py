"""Files that are nearly right: what readers must tell from good ones."""

from __future__ import annotations

import random


def mutated(content: bytes, rng: random.Random, head: int | None = None) -> bytes:
    """A file, changed in one to four places: bits, bytes, pieces, its end.

    Args:
        head: bytes at its beginning in which most of the places are. None: anywhere.
    """
    found = bytearray(content)
    within = len(found) if head is None or rng.random() < 0.1 else head
    for _ in range(rng.randint(1, 4)):
        begin = rng.randrange(min(within, len(found)) + 1)
        end = begin + rng.choice((1, 4, 16, 600))
        match rng.randrange(7):
            case 0:
                found[begin : begin + 1] = bytes(
                    byte ^ 1 << rng.randrange(8) for byte in found[begin : begin + 1]
                )
            case 1:
                found[begin : begin + 1] = rng.randbytes(1)
            case 2:  # one digit, sign, bracket or quote for another
                found[begin : begin + 1] = bytes([rng.choice(b'\x00\xff0123456789-.[]{}":,ae ')])
            case 3:
                found[begin:begin] = rng.randbytes(rng.randint(1, 8))
            case 4:
                del found[begin:end]
            case 5:
                found[end:end] = found[begin:end]
            case 6:
                del found[rng.randrange(len(found) + 1) :]
    return bytes(found)

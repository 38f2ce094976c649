"""Files that are nearly right: what readers must tell from good ones."""

from __future__ import annotations

import random
from collections.abc import Iterator


def mutated(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """So many variants of a file, each changed in one to four places: bits, bytes, pieces, its end."""
    rng = random.Random(seed)
    for _ in range(count):
        found = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            rng.choice(_CHANGES)(found, rng)
        yield bytes(found)


def _flip(found: bytearray, rng: random.Random) -> None:
    if found:
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)


def _replace(found: bytearray, rng: random.Random) -> None:
    if found:
        found[rng.randrange(len(found))] = rng.choice(b'\x00\xff0129-.[]{}",:ae ')


def _insert(found: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(found))
    found[at:at] = rng.randbytes(rng.randint(1, 8))


def _remove(found: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(found))
    del found[at : at + rng.randint(1, 16)]


def _repeat(found: bytearray, rng: random.Random) -> None:
    at = rng.randint(0, len(found))
    piece = found[at : at + rng.randint(1, 64)]
    to = rng.randint(0, len(found))
    found[to:to] = piece


def _cut(found: bytearray, rng: random.Random) -> None:
    del found[rng.randint(0, len(found)) :]


_CHANGES = (_flip, _flip, _replace, _replace, _insert, _remove, _repeat, _cut)

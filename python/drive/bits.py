"""Files of masks: safetensors, one bit an entry, in row-major order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from .distributed.placement import Part, local
from .distributed.shards import Shards
from .distributed.team import team_of, together
from .files import write_atomic

FORMAT = "drive.masks.v1"

_PIECE = 1 << 21  # entries that travel together: 256 KiB of bits, made of 16 MiB of indices


def write_packed(path: Path, masks: Mapping[str, Tensor], parameters: int | None) -> None:
    """Write masks; a crash leaves the old file or the new one.

    Args:
        parameters: of `Masks`.
    """
    packed = {
        name: torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy(), axis=None))
        for name, mask in masks.items()
    }
    write_atomic(path, safetensors.torch.save(packed, _metadata(masks, parameters)))


def write_sharded(
    path: Path,
    masks: Mapping[str, Tensor],
    parameters: int | None,
    process_group: dist.ProcessGroup | None,
) -> None:
    """Write masks of which some are DTensors, by rank 0; all ranks must call it.

    No rank ever holds more than its own shards and a piece of a tensor.
    """
    team = team_of("Masks.save", masks, process_group)
    assert team is not None  # there are DTensors
    with together(team, "compare their masks") as said:
        shards = Shards(team, masks)
        said += shards.said
    shards.meet()
    with together(team, "write masks"):
        pieces = _pieces(shards, masks)
        try:
            if team.rank == 0:
                write_atomic(path, chain([_header(masks, parameters)], pieces))
        finally:  # whatever happened on rank 0, the others wait for its part in each piece
            for _ in pieces:
                pass


def _metadata(masks: Mapping[str, Tensor], parameters: int | None) -> dict[str, str]:
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    known = {} if parameters is None else {"parameters": str(parameters)}
    return {"format": FORMAT, "shapes": shapes, **known}


def _header(masks: Mapping[str, Tensor], parameters: int | None) -> bytes:
    """The beginning of a safetensors file: the header's length, and the header."""
    entries: dict[str, object] = {"__metadata__": _metadata(masks, parameters)}
    end = 0
    for name, mask in masks.items():
        size = (mask.numel() + 7) // 8
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(shards: Shards, masks: Mapping[str, Tensor]) -> Iterator[bytes]:
    for name, mask in masks.items():
        here, part = local(mask).flatten(), shards.parts[name]
        for begin in range(0, part.numel, _PIECE):
            end = min(part.numel, begin + _PIECE)
            packed = torch.from_numpy(np.packbits(_bits(here, part, begin, end).numpy()))
            # no bit is of two owners: adding them up is putting them together
            yield shards.team.sum(packed, "write masks").numpy().tobytes()


def _bits(here: Tensor, part: Part, begin: int, end: int) -> Tensor:
    """The part's own bits among the entries [begin, end) of the whole tensor, the others 0."""
    bits = torch.zeros(end - begin, dtype=torch.uint8)
    if part.owner and here.numel():
        first, last = part.positions(torch.tensor([begin, end])).tolist()
        bits[part.indices(torch.arange(first, last)) - begin] = here[first:last].cpu().to(torch.uint8)
    return bits

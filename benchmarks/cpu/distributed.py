"""A step over several processes against steps of one process each: docs/scaling.md.

python -m benchmarks.cpu.distributed [--entries 25000000] [--ranks 1 2 4] [--rounds 15]

Each rank holds `entries` of one DTensor and computes with one thread. Rounds of four kinds take turns, and in
each all ranks start together:

    alone      one rank takes a step on its own entries, the others wait
    at once    every rank takes a step on its own entries: what the cores can do
    sharded    all ranks take one step on all entries
    in turns   the same as if every rank had a core of its own: one rank computes at a time, and all are in an
               all-reduce together, where they still share the cores. The sum of the slowest rank's times for
               what lies between two all-reduces ("computing"), and of what each of these takes from the last
               rank's entry to the last one's exit ("all-reduces")

Times are medians of all rounds, "in turns" those of each piece. A round lasts until its last rank is done,
by the clock that all processes of a machine share. CPU time is that of a rank's process, all of its threads.
Gloo's network thread spins while a message waits for a rank that is not ready for it: ranks that share cores
would lose them to such threads for milliseconds, so these have the lowest priority.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier, Lock
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from drive import fused_drive_prune

SPARSITY = 0.9
HEADINGS = (
    "ranks", "all-reduces", "bytes a rank", "alone", "at once", "sharded", "in turns", "of it computing",
    "and in all-reduces", "CPU a rank, at once", "CPU a rank, sharded",
)  # fmt: skip


class AllReduces:
    """Measures them, and lets one rank compute at a time in between.

    Attributes:
        bytes: that this rank gives to them.
        entered, left: when, on a clock that all processes of a machine share.
        computed: seconds before the first, between each two, and after the last.
    """

    def __init__(self, turn: Lock, door: Barrier):
        self._turn, self._door, self._real = turn, door, dist.all_reduce

    def __enter__(self) -> AllReduces:
        self.bytes = 0
        self.entered: list[float] = []
        self.left: list[float] = []
        self.computed: list[float] = []
        dist.all_reduce = self._all_reduce
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        dist.all_reduce = self._real

    def _begin(self) -> None:
        self._turn.acquire()
        self._began = time.perf_counter()

    def _end(self) -> None:
        self.computed.append(time.perf_counter() - self._began)
        self._turn.release()

    def _all_reduce(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._end()
        self.bytes += tensor.nbytes
        self._door.wait()
        self.entered.append(time.monotonic())
        work = self._real(tensor, *args, **kwargs)
        self.left.append(time.monotonic())
        self._door.wait()
        self._begin()
        return work


def yield_to_computing() -> None:
    """Lowest priority for Gloo's network thread."""
    for name in Path("/proc/self/task").glob("*/comm"):
        if name.read_text().strip() == "gloo_tcp_loop":
            os.setpriority(os.PRIO_PROCESS, int(name.parent.name), 19)


def slowest(seconds: list[float]) -> list[float]:
    """The largest of all ranks, each."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def timed(door: Barrier, step: Callable[[], object]) -> list[float]:
    """Wall seconds until all ranks are done, and CPU seconds of this one."""
    begin, cpu = time.monotonic(), time.process_time()
    step()
    cpu, end = time.process_time() - cpu, time.monotonic()
    door.wait()
    last, minus_first = slowest([end, -begin])
    return [last + minus_first, cpu]


def rank_main(rank: int, ranks: int, port: int, turn: Lock, door: Barrier, entries: int, rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    dist.barrier()  # starts the threads
    yield_to_computing()
    generator = torch.Generator().manual_seed(rank)
    values, slopes = (torch.randn(entries, generator=generator) for _ in range(2))
    weight = values.clone()
    mesh = init_device_mesh("cpu", (ranks,))
    own = weight, slopes
    sharded = [DTensor.from_local(tensor, mesh, [Shard(0)]) for tensor in own]
    reduces = AllReduces(turn, door)

    def step(tensor: Tensor, grad: Tensor) -> None:
        fused_drive_prune([tensor], [grad], sparsity=SPARSITY)

    def lonely() -> None:
        if rank == 0:
            step(*own)

    def in_turns() -> list[float]:
        """Seconds of this rank's computing, piece by piece, then of all-reduces."""
        with reduces:
            step(*sharded)
        ends = zip(slowest(reduces.left), slowest(reduces.entered), strict=True)
        return reduces.computed + [left - entered for left, entered in ends]

    kinds: dict[str, Callable[[], list[float]]] = {
        "alone": lambda: timed(door, lonely),
        "at once": lambda: timed(door, lambda: step(*own)),
        "sharded": lambda: timed(door, lambda: step(*sharded)),
        "in turns": in_turns,
    }
    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, measured in kinds.items():
            weight.copy_(values)
            dist.barrier()
            seconds = measured()
            if number:  # the first one warms up
                found[kind].append(seconds)
    median = {kind: [statistics.median(some) for some in zip(*found[kind], strict=True)] for kind in kinds}
    pieces, count = slowest(median["in turns"]), len(reduces.left)
    computing, reducing = sum(pieces[:-count]), sum(pieces[-count:])
    if rank == 0:
        shown = [median[kind][0] for kind in ("alone", "at once", "sharded")]
        shown += [computing + reducing, computing, reducing, median["at once"][1], median["sharded"][1]]
        cells = [str(ranks), str(count), f"{reduces.bytes:,}", *(f"{1e3 * time:.1f} ms" for time in shown)]
        print(f"| {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step over several processes.")
    parser.add_argument("--entries", type=int, default=25_000_000, help="of each rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}", flush=True)
    for ranks in options.ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        turn, door = context.Lock(), context.Barrier(ranks)
        mp.spawn(rank_main, (ranks, port, turn, door, options.entries, options.rounds), ranks)


if __name__ == "__main__":
    main()

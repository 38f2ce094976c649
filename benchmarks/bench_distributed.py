"""A step over several processes against steps of one process each: docs/scaling.md.

python benchmarks/bench_distributed.py [--entries 25000000] [--ranks 1 2 4] [--rounds 9]

Each rank holds `entries` in one tensor and computes with one thread. Rounds of four kinds take turns, and in
each all ranks start together:

    alone      one rank takes a step on its own entries, the others wait
    at once    every rank takes a step on its own entries: what the cores can do
    sharded    all ranks take one step on all entries
    in turns   the same, but one rank computes at a time: the sum, over what lies between two all-reduces, of
               the slowest rank's time, as if every rank had a core of its own

A round lasts until its last rank is done. CPU time is that of a rank's process, all of its threads. Gloo's
network thread spins while a message waits for a rank that still computes: ranks that share cores would lose
them to such threads, so these get the lowest priority.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from drive import fused_drive_prune

SPARSITY = 0.9
HEADINGS = (
    "ranks", "alone", "at once", "sharded", "in turns", "all-reduces", "one of 16 KiB", "bytes a rank",
    "CPU a rank, at once", "CPU a rank, sharded",
)  # fmt: skip


class AllReduces:
    """Counts them, and lets one rank compute at a time in between.

    Attributes:
        bytes: that this rank gives to them.
        computed: seconds before the first, between each two, and after the last.
    """

    def __init__(self, turn: Semaphore):
        self.bytes = 0
        self.computed: list[float] = []
        self._turn, self._real = turn, dist.all_reduce

    def __enter__(self) -> AllReduces:
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
        work = self._real(tensor, *args, **kwargs)
        self._begin()
        return work


def yield_to_computing() -> None:
    """Lowest priority for Gloo's network thread."""
    for name in Path("/proc/self/task").glob("*/comm"):
        if name.read_text().strip() == "gloo_tcp_loop":
            os.setpriority(os.PRIO_PROCESS, int(name.parent.name), 19)


def slowest(seconds: list[float]) -> list[float]:
    """Of all ranks, each."""
    found = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def timed(step: Callable[[], object] | None) -> tuple[float, float]:
    """Wall seconds until all ranks are done, and CPU seconds of this one; None: it only waits."""
    dist.barrier()
    begin, cpu = time.monotonic(), time.process_time()  # one clock for all processes of a machine
    if step is not None:
        step()
    cpu = time.process_time() - cpu
    end = time.monotonic() if step is not None else begin
    last, minus_first = slowest([end, -begin])
    return last + minus_first, cpu


def rank_main(rank: int, ranks: int, port: int, turn: Semaphore, entries: int, rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    dist.barrier()  # starts the threads
    yield_to_computing()
    generator = torch.Generator().manual_seed(rank)
    values, slopes = (torch.randn(entries, generator=generator) for _ in range(2))
    weights, grads = [values.clone()], [slopes]

    def step(group: dist.ProcessGroup | None) -> None:
        fused_drive_prune(weights, grads, sparsity=SPARSITY, process_group=group)

    kinds: dict[str, Callable[[], object] | None] = {
        "alone": (lambda: step(None)) if rank == 0 else None,
        "at once": lambda: step(None),
        "sharded": lambda: step(dist.group.WORLD),
    }
    wall: dict[str, list[float]] = {kind: [] for kind in (*kinds, "in turns")}
    cpu: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, what in kinds.items():
            weights[0].copy_(values)
            took = timed(what)
            if number:  # the first one warms up
                wall[kind].append(took[0])
                cpu[kind].append(took[1])
        weights[0].copy_(values)
        dist.barrier()
        with AllReduces(turn) as reduces:
            step(dist.group.WORLD)
        wall["in turns"].append(sum(slowest(reduces.computed)))
    latency = []
    for _ in range(100):
        begin = time.perf_counter()
        dist.all_reduce(torch.zeros(1 << 11, dtype=torch.int64))
        latency.append(time.perf_counter() - begin)
    if rank == 0:
        cells = [str(ranks), *(milliseconds(wall[kind]) for kind in wall), str(len(reduces.computed) - 1)]
        cells += [milliseconds(latency), f"{reduces.bytes:,}"]
        cells += [milliseconds(cpu[kind]) for kind in ("at once", "sharded")]
        print(f"| {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def milliseconds(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step over several processes.")
    parser.add_argument("--entries", type=int, default=25_000_000, help="of each rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{' --- |' * len(HEADINGS)}", flush=True)
    for ranks in options.ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        turn = mp.get_context("spawn").Semaphore(1)
        mp.spawn(rank_main, (ranks, port, turn, options.entries, options.rounds), ranks)


if __name__ == "__main__":
    main()

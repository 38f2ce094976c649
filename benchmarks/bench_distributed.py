"""A step over several processes against as many steps of one process each, at once: docs/scaling.md.

python benchmarks/bench_distributed.py [--entries 25000000] [--ranks 1 2 4] [--rounds 9]

Each rank holds `entries` in one tensor and computes with one thread. Rounds of three kinds take turns, and in
each all ranks start together:

    alone      one rank takes a step on its own entries, the others wait
    at once    every rank takes a step on its own entries, without the others: what the cores can do
    sharded    all ranks take one step on all entries

A round lasts until its last rank is done. CPU time is that of a rank's process, all of its threads.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from drive import fused_drive_prune

SPARSITY = 0.9
Round = tuple[float, float]  # wall seconds of all ranks, CPU seconds of this one


class Counter:
    """Bytes that this rank gives to all-reduces, and how many there are."""

    def __init__(self) -> None:
        self.bytes = self.calls = 0
        self._real = dist.all_reduce

    def __enter__(self) -> Counter:
        dist.all_reduce = self._count
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._real

    def _count(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes, self.calls = self.bytes + tensor.nbytes, self.calls + 1
        return self._real(tensor, *args, **kwargs)


def one_round(step: Callable[[], object] | None) -> Round:
    """All ranks together; None: this one only waits for the others."""
    dist.barrier()
    begin, cpu = time.monotonic(), time.process_time()
    if step is not None:
        step()
    cpu = time.process_time() - cpu
    # one clock for all processes of a machine
    first, last = torch.tensor([begin], dtype=torch.float64), torch.tensor([time.monotonic()]).double()
    last = torch.tensor([time.monotonic()], dtype=torch.float64) if step is not None else first.clone()
    dist.all_reduce(first, dist.ReduceOp.MIN)
    dist.all_reduce(last, dist.ReduceOp.MAX)
    return float(last - first), cpu


def rank_main(rank: int, ranks: int, port: int, entries: int, rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(entries, generator=generator)
    weights = [values.clone()]
    grads = [torch.randn(entries, generator=generator)]

    def step(group: dist.ProcessGroup | None) -> None:
        fused_drive_prune(weights, grads, sparsity=SPARSITY, process_group=group)

    kinds: dict[str, Callable[[], object] | None] = {
        "alone": (lambda: step(None)) if rank == 0 else None,
        "at once": lambda: step(None),
        "sharded": lambda: step(dist.group.WORLD),
    }
    found: dict[str, list[Round]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):  # the first one warms up
        for kind, what in kinds.items():
            weights[0].copy_(values)
            took = one_round(what)
            if number:
                found[kind].append(took)
    weights[0].copy_(values)
    with Counter() as counter:
        step(dist.group.WORLD)
    if rank == 0:
        cells = [f"{1e3 * statistics.median(w for w, _ in found[kind]):.0f} ms" for kind in kinds]
        cpu = [f"{1e3 * statistics.median(c for _, c in found[kind]):.0f} ms" for kind in kinds]
        print(f"| {ranks} | {' | '.join(cells)} | {cpu[1]} | {cpu[2]} | {counter.bytes:,} | {counter.calls} |")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a step over several processes.")
    parser.add_argument("--entries", type=int, default=25_000_000, help="of each rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print("| ranks | alone | at once | sharded | CPU a rank, at once | sharded | bytes a rank | all-reduces |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for ranks in options.ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(rank_main, (ranks, port, options.entries, options.rounds), ranks)


if __name__ == "__main__":
    main()

"""Real processes with a gloo process group, for tests."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PATIENCE = timedelta(seconds=100)  # of the process groups, and
TIMEOUT = 300  # seconds for all that a world does; it takes some 5

# Forked from one server that has imported what takes long. Not `drive`: the server looks in the current
# folder first, where drive_kernels may be of another build than the installed one.
_SLOW = "torch.distributed.tensor", "torch.distributed.fsdp", "torch.optim", "hypothesis", "pytest"
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_SLOW))


def run(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) in `size` ranks: what it returned in each, or the exception that it raised.

    A rank that ends without either gives None. No process is left when this returns.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(size):
            here, there = _context.Pipe(duplex=False)
            process = _context.Process(target=_rank, args=(there, folder, rank, size, function, args))
            process.start()
            there.close()
            ends.append(here)
            processes.append(process)
        try:
            return _results(ends)
        finally:
            for process in processes:
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join()


def _results(ends: list[Connection]) -> list[Any]:
    results: list[Any] = [None] * len(ends)
    deadline, waiting = time.monotonic() + TIMEOUT, set(ends)
    while waiting:
        ready = wait(list(waiting), max(0, deadline - time.monotonic()))
        assert ready, f"ranks {[ends.index(end) for end in waiting]} hang"
        for end in ready:
            waiting.discard(end)
            try:
                results[ends.index(end)] = end.recv()
            except EOFError:  # it died
                results[ends.index(end)] = None
    return results


def returned(results: list[Any]) -> list[Any]:
    """The same, with an assertion that no rank raised or died."""
    for rank, result in enumerate(results):
        assert not isinstance(result, Exception), f"rank {rank}: {result}\n{result.__notes__}"
    return results


class Traffic(TorchDispatchMode):
    """What this rank gives to collectives, PyTorch's own ones for DTensors included.

    Attributes:
        sent: names of the operations and bytes of their tensors, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.sent)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.sent.append((name, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def _rank(
    end: Connection, folder: str, rank: int, size: int, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        result = function(*args)
    except Exception as error:
        result = error
        error.__notes__ = [traceback.format_exc()]
    end.send(result)
    end.close()
    dist.destroy_process_group()

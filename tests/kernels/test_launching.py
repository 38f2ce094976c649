"""Triton kernels while a CUDA graph is captured, with stand-ins for both; on a GPU: test_prune_triton.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from ahead_of_time import Launch

from drive_kernels.launching import launch_kernel
from drive_kernels.linear import packed_triton


class Kernel:
    __name__ = "multiply"

    def __init__(self, loaded: bool):
        self.loaded = loaded
        self.calls: list[str] = []

    def warmup(self, *, grid: tuple[int, ...], x: int) -> SimpleNamespace:
        self.calls.append(f"compiled for {grid}, {x}")
        return SimpleNamespace(module=object() if self.loaded else None)

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda x: self.calls.append(f"launched for {grid}, {x}")


@pytest.mark.parametrize("capturing", (None, False, True))
@pytest.mark.parametrize("loaded", (False, True))
def test_refuses_what_is_not_loaded(capturing: bool | None, loaded: bool, monkeypatch: pytest.MonkeyPatch):
    if capturing is not None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    kernel = Kernel(loaded)
    if capturing and not loaded:
        with pytest.raises(RuntimeError, match="Triton kernel multiply cannot be loaded while a CUDA graph"):
            launch_kernel(kernel, (3,), x=4)
    else:
        launch_kernel(kernel, (3,), x=4)
    expected = ["compiled for (3,), 4"] if capturing else []
    assert kernel.calls == expected + ["launched for (3,), 4"] * (loaded or not capturing)


def test_compiling_loads_nothing():
    """What launch_kernel relies on, and how it sees it."""
    parts, output = torch.ones(2, 8, 64), torch.ones(8, 64)
    arguments = {"parts": parts, "bias": None, "output": output, "entries": 512, "outputs": 64, "splits": 2}
    launch = Launch.of(packed_triton.add_up, {**arguments, "BLOCK": 1024})
    assert launch.compile(80).module is None

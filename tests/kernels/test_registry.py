"""What serves GPUs that the compiled kernels, or Triton, cannot run on: with stand-ins for the GPUs.

test_cuda_on_host.py has the compiled part's side of it.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import drive_kernels
from drive.experiments.bench import workload
from drive.experiments.cli import info
from drive_kernels import registry
from drive_kernels.library import references
from drive_kernels.linear import block, masked
from drive_kernels.prune.op import reference

pytest.importorskip("triton", reason="Triton is not installed")

from drive_kernels.linear import masked_triton
from drive_kernels.prune.triton import launch

NO_IMAGE = "no kernel image is available for execution on the device"
GPUS = {0: ("Tesla T4", (7, 5)), 1: ("NVIDIA A100", (8, 0)), 2: ("NVIDIA B300", (10, 3))}
T4 = "it was compiled for sm_80, compute_80 (no kernel image is available for execution on the device)"
OLD = "Triton supports compute capability 8.0 and later, got 7.5"


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with three GPUs; its driver cannot compile the PTX for the newest of them."""
    compiled = SimpleNamespace(
        build_info=lambda: {"cuda": "13.0", "gpu architectures": "sm_80, compute_80"},
        why_not_served=lambda gpu: {0: NO_IMAGE, 1: None, 2: "the PTX is too new"}[gpu],
    )
    caches = (registry.faults, registry._serving, registry._warn)
    monkeypatch.setattr(drive_kernels, "_C", compiled)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: GPUS[gpu][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: GPUS[gpu][1])
    good = {"compiled CUDA kernel": None, "Triton kernel": None, "reference in PyTorch": None}
    monkeypatch.setitem(registry.implementations["drive::prune_"], "cuda", good)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_each_gpu_has_its_own():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert registry._serving("prune_", 0) is reference
            assert registry._serving("masked_linear", 0) is masked.linear_reference
            assert registry._serving("block_linear_backward", 0) is block.backward_reference
            assert registry._serving("masked_linear", 1) is masked_triton.masked_linear
            assert registry._serving("prune_", 2) is launch.prune_
            assert registry._serving("prune_to_cost_", 2) is launch.prune_to_cost_
            assert registry._serving("masked_linear", 2) is masked_triton.masked_linear
    assert [str(w.message) for w in caught] == [
        "drive: slower implementations serve cuda:0, Tesla T4 (see drive info): "
        f"no compiled CUDA kernel, because {T4}; no Triton kernel, because {OLD}",
        "drive: slower implementations serve cuda:2, NVIDIA B300 (see drive info): "
        "no compiled CUDA kernel, because it was compiled for sm_80, compute_80 (the PTX is too new)",
    ], "one a GPU"


def test_info():
    facts = info.facts()
    assert facts["cuda"]["device 0"] == "Tesla T4, compute capability 7.5"
    served = facts["drive::prune_"]
    assert served.pop("cpu")
    assert served == {
        "cuda": "compiled CUDA kernel",
        "cuda:0": f"reference in PyTorch, because {T4} and {OLD}",
        "cuda:2": "Triton kernel, because it was compiled for sm_80, compute_80 (the PTX is too new)",
    }
    assert facts["drive::packed_linear"]["cuda:0"] == f"reference in PyTorch, because {OLD}"
    assert "cuda:1" not in facts["drive::packed_linear"]
    assert facts["drive::sparse_linear"]["cuda"] == "reference in PyTorch"


def test_info_of_a_gpu_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch):
    def full(gpu: int) -> None:
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setattr(drive_kernels._C, "why_not_served", full)
    served = info.facts()["drive::prune_"]
    assert served["cuda:2"] == "not usable: CUDA error: out of memory"


def test_benchmarks_time_what_they_name(monkeypatch: pytest.MonkeyPatch):
    """Not what serves in its place."""
    for gpu, compiled, triton in ((0, T4, OLD), (1, None, None), (2, "the PTX is too new", None)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda gpu=gpu: gpu)
        for name, op, wrong in (
            ("compiled", torch.ops.drive.prune_, compiled),
            ("triton", launch.prune_, triton),
        ):
            if wrong is None:
                assert workload.implementation(name) is op
            else:
                with pytest.raises(ImportError, match=re.escape(wrong)):
                    workload.implementation(name)
    with pytest.raises(ImportError, match="there is no Triton kernel for cpu"):
        workload.implementation("triton", "cpu")


def test_every_op_has_a_reference():
    """Which has its arguments, and is what tensors get where there is no kernel for them."""
    for name, op in registry.OPS.items():
        schema = getattr(torch.ops.drive, name).default._schema
        names, own = [a.name for a in schema.arguments], inspect.signature(references[name]).parameters
        assert list(own)[: len(names)] == names, name
        assert all(p.default is not p.empty for p in list(own.values())[len(names) :]), name
        if "cuda" in op.compiled:
            fallback = getattr(torch.ops.drive_fallback, name).default
            assert str(fallback._schema) == str(schema).replace("drive::", "drive_fallback::")


UNCOMPILED = """
import sys
sys.modules["drive_kernels._C"] = None
import torch, drive
from torch._subclasses import FakeTensorMode

def step():
    weight, grad = torch.ones(4), torch.arange(4.0)
    mask = torch.ones(4, dtype=torch.bool)
    torch.ops.drive.prune_([weight], [grad], [], [mask], True, 2, 0)
    return weight

with FakeTensorMode():
    assert step().shape == (4,)
print("nothing was pruned yet", file=sys.stderr)
for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager"), step):
    assert call().tolist() == [0, 0, 1, 1]
assert drive.fused_drive_prune([torch.ones(4)], [torch.arange(4.0)], sparsity=0.5).pruned == 2
"""


def test_a_package_that_was_not_compiled_says_so_once(tmp_path: Path):
    """At its first step, to a user who has set up no logging."""
    run = subprocess.run(
        [sys.executable, "-c", UNCOMPILED], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        "nothing was pruned yet",
        "drive_kernels is not compiled (import of drive_kernels._C halted; None in sys.modules): "
        "slower kernels serve (see drive info)",
    ]


def test_import_asks_no_gpu():
    """It must not make a CUDA context: a process may fork afterwards."""
    script = """
import torch
def refuse(*_): raise AssertionError("asked")
for name in ("get_device_capability", "get_device_properties", "current_device", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
import drive
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.gpu
def test_the_fallback_on_the_device(monkeypatch: pytest.MonkeyPatch):
    """The reference, by the op that the compiled part would hand over to."""
    monkeypatch.undo()
    weight, grad = torch.randn(2, 1000, device="cuda")
    mask = torch.ones(1000, dtype=torch.bool, device="cuda")
    monkeypatch.setattr(registry, "_serving", lambda name, gpu: references[name])
    args = ([weight.clone()], [grad], [], [mask.clone()], True, 900, 0)
    other = ([weight.clone()], [grad], [], [mask.clone()], True, 900, 0)
    torch.ops.drive_fallback.prune_(*args)
    torch.ops.drive.prune_(*other)
    assert torch.equal(args[3][0], other[3][0]) and torch.equal(args[0][0], other[0][0])

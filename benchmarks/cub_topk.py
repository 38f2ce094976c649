"""cub::DeviceTopK for tensors (see cub_topk.cu): compiled by nvcc when it is first asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

HEADER = "cub/device/device_topk.cuh"


def headers() -> Path | None:
    """A CCCL newer than the toolkit's: in the folder that $CCCL names, or beside PyTorch."""
    beside = [found for path in sys.path for found in Path(path).glob("nvidia/cu*/include/cccl")]
    for folder in [Path(os.environ.get("CCCL", "")), *beside]:
        if (folder / HEADER).exists():
            return folder
    return None


def build(folder: Path, arch: str) -> Path:
    """Compile for an architecture such as sm_90; ImportError with the compiler's words if that fails."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ImportError("no nvcc to build it")
    library, include = folder / "cub_topk.so", headers()
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-O3", "-std=c++17", f"-arch={arch}"]
    command += ["-I", str(include)] if include else []
    command += [str(Path(__file__).with_suffix(".cu")), "-o", str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise ImportError(f"does not compile: {run.stderr.strip().splitlines()[0]}")
    return library


@functools.cache
def load() -> Callable[..., int]:
    """The C function, compiled for the present GPU; ImportError says why there is none."""
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        function = ctypes.CDLL(str(build(Path(folder), f"sm_{major}{minor}"))).cub_topk
    void, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [void, ctypes.POINTER(ctypes.c_size_t), void, void, count, count, void]
    if function(None, ctypes.c_size_t(), None, None, 2, 1, None) < 0:
        raise ImportError(f"the toolkit's CCCL has no {HEADER}")
    return function


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k largest of a float32 vector, in any order."""
    function, stream, size = load(), torch.cuda.current_stream().cuda_stream, ctypes.c_size_t()
    largest = scores.new_empty(k)
    arguments = (size, scores.data_ptr(), largest.data_ptr(), scores.numel(), k, stream)
    function(None, *arguments)
    scratch = torch.empty(size.value, dtype=torch.uint8, device=scores.device)
    if error := function(scratch.data_ptr(), *arguments):
        raise RuntimeError(f"cub::DeviceTopK: CUDA error {error}")
    return largest

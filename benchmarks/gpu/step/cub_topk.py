"""cub::DeviceTopK for tensors (see cub_topk.cu): compiled by nvcc when it is first asked for, and kept.

python -m benchmarks.gpu.step.cub_topk compiles it beforehand. Whether it went well or not is kept in
build/gpu, for these sources, compiler and headers: a compiler that cannot do it is not asked again for every
case.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.build import BUILD

HEADER = "cub/device/device_topk.cuh"


def headers() -> Path | None:
    """A CCCL newer than the toolkit's: in the folder that $CCCL names, or beside PyTorch."""
    beside = [found for path in sys.path for found in Path(path).glob("nvidia/cu*/include/cccl")]
    for folder in [Path(os.environ.get("CCCL", "")), *beside]:
        if (folder / HEADER).exists():
            return folder
    return None


def build(folder: Path, arch: str) -> Path:
    """The library in a folder, for an architecture such as sm_90.

    Raises:
        ImportError: it does not compile, now or when it was tried before; with the compiler's words.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ImportError("no nvcc to build it")
    source, include = Path(__file__).with_suffix(".cu"), headers()
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    made_of = [source.read_bytes(), version, str(include).encode(), arch.encode()]
    library = folder / f"cub_topk-{hashlib.sha256(b''.join(made_of)).hexdigest()[:16]}.so"
    failure = library.with_suffix(".failed")
    if failure.exists():
        raise ImportError(failure.read_text())
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-O3", "-std=c++17", f"-arch={arch}"]
    command += ["-I", str(include)] if include else []
    run = subprocess.run(
        [*command, str(source), "-o", str(partial)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        failure.write_text(f"does not compile: {run.stderr.strip().splitlines()[0]}")
        raise ImportError(failure.read_text())
    return partial.rename(library)


@functools.cache
def load() -> Callable[..., int]:
    """The C function, compiled for the present GPU; ImportError says why there is none."""
    major, minor = torch.cuda.get_device_capability()
    function = ctypes.CDLL(str(build(BUILD, f"sm_{major}{minor}"))).cub_topk
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


if __name__ == "__main__":
    try:
        load()
    except ImportError as error:
        print(error)

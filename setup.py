"""Build of drive_kernels._C: the CPU part always, the CUDA part where it can be.

DRIVE_CUDA=auto (default) builds csrc/*.cu if torch was built with CUDA and a toolkit is found, 1 insists
on it, 0 leaves it out. No GPU need be visible: without TORCH_CUDA_ARCH_LIST a default list serves.
"""

import glob
import os
import re
import shutil
import subprocess

import torch
from setuptools import setup
from torch.utils import cpp_extension

CXX_FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# IEEE products on every backend: no contraction to FMA. -Wno-psabi: vectors wider than the baseline's
# registers are passed between inlined functions only. GCC 12's own AVX-512 headers seem uninitialised to it.
CXX_FLAGS += ["-ffp-contract=off", "-Wno-psabi", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-O3", "--fmad=false", "--ftz=false", "-lineinfo", "--threads=0"]
ARCHITECTURES = "8.0;9.0;10.0+PTX"


def cuda_home() -> str | None:
    """A toolkit's folder with headers and cudart: nvcc may be a wrapper script far away from them."""
    candidates = [cpp_extension.CUDA_HOME, os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
        if top := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M):
            candidates.append(top[1])
    libraries = ("lib64/libcudart.so*", "lib/libcudart.so*", "targets/*/lib/libcudart.so*")
    for home in filter(None, candidates):
        if any(glob.glob(f"{home}/{library}") for library in libraries):
            return os.path.realpath(home)
    return None


def with_cuda(sources: list[str]) -> bool:
    choice = os.environ.get("DRIVE_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: DRIVE_CUDA must be auto, 0 or 1, got {choice!r}")
    missing = [
        what
        for what, there in {
            "CUDA sources": sources,
            "a torch built with CUDA": torch.version.cuda,
            "a CUDA toolkit": cuda_home(),
        }.items()
        if not there
    ]
    if choice == "1" and missing:
        raise SystemExit(f"setup.py: DRIVE_CUDA=1 needs {' and '.join(missing)}")
    return choice != "0" and not missing


def extension() -> cpp_extension.CppExtension:
    sources, cuda_sources = sorted(glob.glob("csrc/*.cpp")), sorted(glob.glob("csrc/*.cu"))
    headers = sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*.cuh"))
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    make = cpp_extension.CppExtension
    if with_cuda(cuda_sources):
        cpp_extension.CUDA_HOME = cuda_home()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        sources, make = sources + cuda_sources, cpp_extension.CUDAExtension
        flags["cxx"] = [*CXX_FLAGS, f'-DDRIVE_WITH_CUDA="{torch.version.cuda}"']
    return make(
        "drive_kernels._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=["-fopenmp"]
    )


class Build(cpp_extension.BuildExtension):
    """prune.cpp and prune.cu would both be compiled to prune.o."""

    def build_extensions(self) -> None:
        names = self.compiler.object_filenames
        self.compiler.object_filenames = lambda sources, *args, **options: [
            name.removesuffix(".o") + (".cuda.o" if source.endswith(".cu") else ".o")
            for source in sources
            for name in names([source], *args, **options)
        ]
        super().build_extensions()


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})

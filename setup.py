"""Build of drive_kernels._C: the CPU part always, the CUDA part where it is wanted.

DRIVE_CUDA=1 builds csrc/**/*.cu, for TORCH_CUDA_ARCH_LIST or else for a default list; no GPU need be visible.
0 leaves it out. auto (default) builds it where it can be, and either a GPU is visible or that list is given.
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
if "-g" not in os.environ.get("CFLAGS", "").split():
    CXX_FLAGS += ["-g0"]  # Python's own flags often have -g: half of the build, and most of its bytes
NVCC_FLAGS = ["-O3", "--fmad=false", "--ftz=false", "-lineinfo", "--threads=0"]
# Machine code for Ampere and Ada (8.x), Hopper, and data center Blackwell; PTX of the newest for what comes
# later, and for other Blackwells. The kernels need 8.0, and an nvcc before 12.8 does not know 10.0.
ARCHITECTURES = (80, 90, 100)


def cuda_home() -> str | None:
    """A toolkit's folder with nvcc and cudart: the nvcc on the path may be a wrapper script elsewhere."""
    candidates = [cpp_extension.CUDA_HOME, os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
        if top := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M):
            candidates.append(top[1])
    libraries = ("lib64/libcudart.so*", "lib/libcudart.so*", "targets/*/lib/libcudart.so*")
    for home in filter(None, candidates):
        if os.path.exists(f"{home}/bin/nvcc") and any(glob.glob(f"{home}/{each}") for each in libraries):
            return os.path.realpath(home)
    return None


def architectures(home: str) -> list[str]:
    """Those to build for, as nvcc calls them: sm_* for machine code, compute_* for PTX."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        asked = [flag.rpartition("=")[2] for flag in cpp_extension._get_cuda_arch_flags()]
        chosen = [name for name in asked if int(re.sub(r"\D", "", name)) >= min(ARCHITECTURES)]
        if left_out := ", ".join(name for name in asked if name not in chosen):
            print(f"setup.py: no CUDA kernels for {left_out} of TORCH_CUDA_ARCH_LIST: they need 8.0 or later")
        return chosen
    nvcc = [f"{home}/bin/nvcc", "--list-gpu-code"]
    known = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout.split()
    numbers = [number for number in ARCHITECTURES if f"sm_{number}" in known]
    return [f"sm_{number}" for number in numbers] + [f"compute_{number}" for number in numbers[-1:]]


def cuda_architectures(sources: list[str]) -> list[str]:
    """What to build the CUDA part for; nothing if it cannot be built, or is not to be."""
    choice = os.environ.get("DRIVE_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: DRIVE_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return []
    home = cuda_home()
    found = architectures(home) if home else []
    missing = [
        what
        for what, there in {
            "CUDA sources": sources,
            "a torch built with CUDA": torch.version.cuda,
            "a CUDA toolkit": home,
            "an architecture of 8.0 or later that nvcc knows": found or not home,
        }.items()
        if not there
    ]
    if missing:
        if choice == "1":
            raise SystemExit(f"setup.py: DRIVE_CUDA=1 needs {' and '.join(missing)}")
        return []
    if choice == "auto" and not (os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available()):
        print("setup.py: no GPU is visible, so no CUDA kernels are built: DRIVE_CUDA=1 builds them")
        return []
    return found


def extension() -> cpp_extension.CppExtension:
    sources, cuda_sources, headers, cuda_headers = (
        sorted(glob.glob(f"csrc/**/*.{kind}", recursive=True)) for kind in ("cpp", "cu", "h", "cuh")
    )
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    make = cpp_extension.CppExtension
    if names := cuda_architectures(cuda_sources):
        cpp_extension.CUDA_HOME = cuda_home()
        sources, make = sources + cuda_sources, cpp_extension.CUDAExtension
        flags["cxx"] = [
            *CXX_FLAGS,
            f'-DDRIVE_WITH_CUDA="{torch.version.cuda}"',
            f'-DDRIVE_GPU_ARCHITECTURES="{", ".join(names)}"',
        ]
        flags["nvcc"] = [
            *NVCC_FLAGS,
            *(f"-gencode=arch={re.sub('.*_', 'compute_', name)},code={name}" for name in names),
        ]
    return make(
        "drive_kernels._C",
        sources,
        depends=headers + cuda_headers,
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=flags,
        extra_link_args=["-fopenmp"],
    )


# The licence is here since pyproject.toml can name it in two ways only: one is an error before setuptools 77,
# the other is deprecated since.
setup(license="BSD-3-Clause", ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})

"""Facts about the build and the machine, for `drive info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

import drive_kernels
from drive import __version__
from drive.experiments.runs.inputs import EXTRAS
from drive_kernels.registry import Wrong, on_gpu


def facts() -> dict[str, dict[str, str]]:
    """Versions, build, CPU, CUDA, Triton, extras, and what serves each op: section -> name -> text."""
    return {
        "versions": {
            "drive": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
        },
        "build": _build(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
        },
        "cuda": _cuda(),
        "triton": {"triton": _version("triton")},
        "extras": {
            f"[{extra}] {package}": _version(package)
            for extra, packages in EXTRAS.items()
            for package in packages
        },
        **{
            op: _served_by(op, devices)
            for op, devices in drive_kernels.implementations.items()
            if not op.endswith("_backward")  # what serves an op serves its backward
        },
    }


def _build() -> dict[str, str]:
    compiled: Any = drive_kernels._C
    if compiled is None:
        return {"compiled kernels": f"no: {drive_kernels.build_error}"}
    details = compiled.build_info() if hasattr(compiled, "build_info") else {}
    return {"compiled kernels": "yes", **details}


def _cuda() -> dict[str, str]:
    if torch.version.cuda is None:
        return {"available": "no: this torch was built for the CPU only"}
    if not torch.cuda.is_available():
        return {"available": f"no: torch for CUDA {torch.version.cuda} finds no usable device"}
    devices = {f"device {i}": _gpu(i) for i in range(torch.cuda.device_count())}
    return {"available": f"yes, CUDA {torch.version.cuda}", **devices}


def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def _version(package: str) -> str:
    """The version of an installed package, or why it is not usable."""
    try:
        if importlib.util.find_spec(package) is None:
            return "not installed"
    except (ImportError, ValueError) as error:
        return f"not usable: {error}"
    distributions = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(distributions[0])
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _served_by(op: str, devices: dict[str, Wrong]) -> dict[str, str]:
    """Which implementation serves an op on a device, and why none of the better ones; GPUs that are served in
    another way than CUDA in general have lines of their own."""
    found = {device: _first(implementations) for device, implementations in devices.items()}
    for gpu in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            says = _first(on_gpu(op, gpu))
        except RuntimeError as error:  # its memory is full, say
            says = f"not usable: {str(error).splitlines()[0]}"
        if says != found["cuda"]:
            found[f"cuda:{gpu}"] = says
    return found


def _first(implementations: Wrong) -> str:
    names, wrong = zip(*implementations.items(), strict=True)
    first = wrong.index(None)
    return f"{names[first]}, because {' and '.join(wrong[:first])}" if first else str(names[first])

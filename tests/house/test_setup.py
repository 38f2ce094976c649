"""setup.py: for which architectures it builds, with what nvcc knows and which flags; nothing is compiled."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
# of nvcc --list-gpu-code
BEFORE = "sm_50 sm_52 sm_53 sm_60 sm_61 sm_62 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90"
KNOWN = {
    "12.6": BEFORE,
    "12.8": f"{BEFORE} sm_100 sm_101 sm_120",
    "13.0": "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121",
    "without 8.0": "sm_90 sm_100 sm_120",
    "of another world": "sm_200",
}


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a CUDA toolkit, for a torch that was built with CUDA and sees a GPU."""
    for folder in ("bin", "lib64"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib64" / "libcudart.so").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.delenv("DRIVE_CUDA", raising=False)
    return tmp_path


def codes(toolkit: Path, known: str | None) -> list[str] | None:
    """For what nvcc is told to make code, if the CUDA part is built."""
    nvcc = toolkit / "bin" / "nvcc"
    if known is not None:
        nvcc.write_text(f"#!/bin/sh\n[ $1 = --list-gpu-code ] && printf '%s\\n' {known}\n")
        nvcc.chmod(0o755)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", found.update)
        runpy.run_path(str(ROOT / "setup.py"))
    (extension,) = found["ext_modules"]
    flags = extension.extra_compile_args
    if "csrc/prune/cuda/prune.cu" not in extension.sources:
        assert not any("-DDRIVE_WITH_CUDA" in flag for flag in flags["cxx"])
        return None
    found = [flag.removeprefix("-gencode=arch=") for flag in flags["nvcc"] if "arch" in flag]
    pairs = [flag.split(",code=") for flag in found]
    assert all(virtual.removeprefix("compute_") == code.split("_")[1] for virtual, code in pairs)
    names = [code for _, code in pairs]
    assert f'-DDRIVE_GPU_ARCHITECTURES="{", ".join(names)}"' in flags["cxx"]
    # torch adds none of its own
    assert cpp_extension._get_cuda_arch_flags(flags["nvcc"]) == []
    return names


@pytest.mark.parametrize(
    ("version", "expected"),
    (
        ("12.6", ["sm_80", "sm_90", "compute_90"]),
        ("12.8", ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("13.0", ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("without 8.0", ["sm_90", "sm_100", "compute_100"]),
        ("of another world", None),
    ),
)
def test_default_is_what_nvcc_knows(version: str, expected: list[str] | None, toolkit: Path):
    assert codes(toolkit, KNOWN[version]) == expected


@pytest.mark.parametrize(
    ("listed", "expected", "left_out"),
    (
        ("9.0", ["sm_90"], ""),
        ("8.6 9.0a+PTX", ["sm_86", "compute_90a", "sm_90a"], ""),
        ("Turing;Ampere", ["sm_80", "compute_86", "sm_86"], "compute_75, sm_75"),
        ("7.0;7.5;8.0", ["sm_80"], "sm_70, sm_75"),
        ("7.5", None, "sm_75"),
    ),
)
def test_a_list_of_ones_own(
    listed: str,
    expected: list[str] | None,
    left_out: str,
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """As in containers that name all GPUs: those that cannot be served are left out, in a line."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert codes(toolkit, KNOWN["13.0"]) == expected
    says = f"setup.py: no CUDA kernels for {left_out} of TORCH_CUDA_ARCH_LIST: they need 8.0 or later\n"
    assert capsys.readouterr().out == (says if left_out else "")


@pytest.mark.parametrize("listed", (None, "9.0"))
@pytest.mark.parametrize("choice", (None, "auto", "1", "0"))
def test_without_a_gpu_only_what_is_asked_for(
    choice: str | None,
    listed: str | None,
    toolkit: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """By DRIVE_CUDA=1, or by a list; what is left out is said in a line, if it could have been built."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (("DRIVE_CUDA", choice), ("TORCH_CUDA_ARCH_LIST", listed)):
        if value is not None:
            monkeypatch.setenv(name, value)
    asked = choice == "1" or (listed and choice != "0")
    says = "setup.py: no GPU is visible, so no CUDA kernels are built: DRIVE_CUDA=1 builds them\n"
    architectures = ["sm_90"] if listed else ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert codes(toolkit, KNOWN["13.0"]) == (architectures if asked else None)
    assert capsys.readouterr().out == (says if not asked and choice != "0" else "")
    monkeypatch.setattr(torch.version, "cuda", None)
    if choice != "1":
        assert codes(toolkit, None) is None
        assert capsys.readouterr().out == ""


def test_insists(toolkit: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DRIVE_CUDA", "1")
    with pytest.raises(
        SystemExit, match="DRIVE_CUDA=1 needs an architecture of 8.0 or later that nvcc knows$"
    ):
        codes(toolkit, KNOWN["of another world"])
    monkeypatch.setenv("DRIVE_CUDA", "0")
    assert codes(toolkit, KNOWN["13.0"]) is None


def test_libraries_without_a_compiler_are_no_toolkit(toolkit: Path, monkeypatch: pytest.MonkeyPatch):
    exists = os.path.exists  # of this machine's own toolkits, nothing
    monkeypatch.setattr(os.path, "exists", lambda path: str(path).startswith(str(toolkit)) and exists(path))
    assert codes(toolkit, None) is None
    monkeypatch.setenv("DRIVE_CUDA", "1")
    with pytest.raises(SystemExit, match="DRIVE_CUDA=1 needs a CUDA toolkit$"):
        codes(toolkit, None)


@pytest.mark.parametrize(("cflags", "left_out"), (("", True), ("-O1 -g -fsanitize=address", False)))
def test_debug_information_is_for_those_who_ask(cflags: str, left_out: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CFLAGS", cflags)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    assert ("-g0" in runpy.run_path("setup.py")["CXX_FLAGS"]) == left_out

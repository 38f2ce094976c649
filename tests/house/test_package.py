"""The package as others get it: what an sdist holds, which extras there are, what a type checker sees."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import drive
from drive.__main__ import main
from drive.experiments.runs.inputs import EXTRAS

ROOT = Path(__file__).parents[2]
BUILT_OF = ("csrc", "python", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
USER = """
from torch import nn
from drive import fused_drive_prune

reveal_type(fused_drive_prune(nn.Linear(3, 4), sparsity=0.5))
fused_drive_prune(nn.Linear(3, 4), sparsity="half")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built of, without what an earlier build has left."""
    folder = tmp_path_factory.mktemp("sources")
    left = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    for name in BUILT_OF:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=left)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def setup(folder: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DRIVE_CUDA", "0")
        patch.setattr(sys, "argv", ["setup.py", "-q", *arguments])
        runpy.run_path("setup.py")


@pytest.fixture(scope="module")
def sdist(sources: Path) -> tarfile.TarFile:
    setup(sources, "sdist")
    (made,) = (sources / "dist").iterdir()
    with tarfile.open(made) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(sdist: tarfile.TarFile) -> Message:
    (name,) = (name for name in sdist.getnames() if re.fullmatch("[^/]+/PKG-INFO", name))
    return Parser().parsestr(sdist.extractfile(name).read().decode())


def test_sdist_holds_all_that_the_build_needs(sources: Path, sdist: tarfile.TarFile):
    """Whatever this machine builds of it: all kernels for CUDA, too."""
    held = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    left = ("dist/", "python/drive_prune.egg-info/")
    files = (path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file())
    needed = {name for name in files if not name.startswith(left)}
    assert {"csrc/prune/cuda/prune.cu", "csrc/prune/cuda/step.cuh", "python/drive/py.typed"} < needed
    assert needed - held == set()
    assert not any(name.startswith("tests/") for name in held)


def test_one_version(metadata: Message):
    assert metadata["Version"] == drive.__version__
    assert f"\nversion: {drive.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {drive.__version__}, " in (ROOT / "CHANGELOG.md").read_text()


def test_extras(metadata: Message):
    """Those that are named to someone who lacks one are those that there are."""
    assert set(metadata.get_all("Provides-Extra")) == {*EXTRAS, "dev"}
    required = "\n".join(metadata.get_all("Requires-Dist"))
    for extra, modules in EXTRAS.items():
        module = modules[0].replace("sklearn", "scikit-learn").replace("_", "-")
        assert re.search(rf"^{module}; extra == .{extra}.$", required, re.M), required
    core = re.findall(r"^(\w+)[^;\n]*(?:; sys_platform == .linux.)?$", required, re.M)
    assert sorted(core) == ["numpy", "safetensors", "torch", "triton"]
    assert re.search(r"^drive-prune\[cli\]; extra == .experiments.$", required, re.M)


@pytest.mark.parametrize("missing", EXTRAS["cli"])
def test_command_without_its_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["info"]) == 2
    assert capsys.readouterr() == (
        "", f"drive: {missing} must be installed (pip install 'drive-prune[cli]')\n"
    )  # fmt: skip


@pytest.mark.parametrize("install", ("editable", "wheel"))
def test_types_are_seen(install: str, sources: Path, tmp_path: Path):
    """By mypy, in a folder of the user's; without torch, which would take it half a minute."""
    packages = sources / "python"
    if install == "wheel":
        packages = tmp_path / "wheel"
        setup(sources, "build_py", "--build-lib", str(packages))
    environment = tmp_path / "environment"
    venv.create(environment)
    (site,) = environment.glob("lib/*/site-packages")
    (site / "drive.pth").write_text(str(packages))
    (tmp_path / "user.py").write_text(USER)
    options = ["--strict", "--ignore-missing-imports", "--config-file=", "--cache-dir=/dev/null"]
    python = ["--python-executable", str(environment / "bin" / "python")]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *python, "user.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    first, second, last = run.stdout.splitlines()
    assert first == 'user.py:5: note: Revealed type is "drive.result.PruneResult"'
    assert second.startswith('user.py:6: error: Argument "sparsity" to "fused_drive_prune" has incompatible')
    assert last == "Found 1 error in 1 file (checked 1 source file)"

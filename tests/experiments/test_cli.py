"""The command line: what it rejects, what it says, what it leaves behind."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from images import image_folder
from processes import environment

import drive
import drive_kernels
from drive.experiments.cli.app import main
from drive.experiments.runs.inputs import InputError
from drive.experiments.training.compute import Compute
from drive.experiments.training.networks import Network

TINY = ["--epochs", "2", "--limit-train", "128", "--batch-size", "32"]
TINY_PRUNE = [*TINY, *["--warmup-epochs", "1", "--iterations", "2", "--seeds", "1", "--sparsities", "0.9"]]

needs_digits = pytest.mark.skipif(
    any(find_spec(module) is None for module in ("sklearn", "matplotlib")),
    reason="the digits come with scikit-learn, the figures with matplotlib",
)


pytestmark = pytest.mark.usefixtures("in_empty_folder")


def rejected(capsys: pytest.CaptureFixture[str], command: str, status: int = 2) -> str:
    """The one line on stderr that a bad command line gives."""
    assert main(command.split()) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"drive {command.split()[0]}: "), lines
    return lines[0].partition(": ")[2]


def python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--sparsities nan",
            "--sparsities must be distinct numbers in [0, 1), separated by commas, got 'nan'",
        ),
        (
            "--sparsities 0.9,1",
            "--sparsities must be distinct numbers in [0, 1), separated by commas, got '0.9,1'",
        ),
        ("--sparsities 0.9,0.9", "--sparsities must be distinct"),
        ("--sparsities -0.1", "--sparsities must be distinct"),
        ("--sparsities many", "--sparsities must be distinct"),
        ("--macs 0", "--macs must be distinct numbers in (0, 1], separated by commas, got '0'"),
        ("--macs 1.5", "--macs must be distinct numbers in (0, 1], separated by commas, got '1.5'"),
        ("--macs 0.1 --sparsities 0.9", "--macs must be left out with --sparsities, got both"),
        ("--macs 0.1 --alpha -1", "--alpha must be a finite number >= 0, got '-1'"),
        ("--alpha 0.5", "--alpha must be left out without --macs, got 0.5"),
        ("--macs 0.1 --methods snip,rigl", "--methods must rank all layers together with --macs, got rigl"),
        ("--seeds 0", "--seeds must be an integer in [1, 10000], got '0'"),
        ("--seeds 1.5", "--seeds must be an integer in [1, 10000], got '1.5'"),
        ("--seeds 1000000000", "--seeds must be an integer in [1, 10000], got '1000000000'"),
        ("--epochs zero", "--epochs must be an integer >= 1, got 'zero'"),
        ("--warmup-epochs -1", "--warmup-epochs must be an integer >= 0, got '-1'"),
        ("--warmup-epochs 20", "--warmup-epochs must be fewer than the 20 epochs, got 20"),
        ("--iterations 0", "--iterations must be an integer >= 1, got '0'"),
        ("--batch-size 1", "--batch-size must be an integer >= 2, got '1'"),
        ("--limit-train 1", "--limit-train must be an integer >= 2, got '1'"),
        ("--lr 0", "--lr must be a finite number > 0, got '0'"),
        ("--lr inf", "--lr must be a finite number > 0, got 'inf'"),
        ("--lr nan", "--lr must be a finite number > 0, got 'nan'"),
        ("--device gpu", "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("--device cuda:99", "--device must be a device of this machine, got 'cuda:99'"),
        (
            "--data svhn",
            "--data must be one of digits, mnist, cifar10, cifar100, tinyimagenet, imagenet32, imagefolder, "
            "got 'svhn'",
        ),
        ("--model vgg", "--model must be one of small_cnn, mlp, cnn4, resnet8, resnet18, vgg16, vgg16_bn, "),
        (
            "--model alexnet",
            "--model must be one of small_cnn, mlp, resnet8, resnet18 for images of side 8, got alexnet",
        ),
        ("--methods drive,luck", "--methods must be distinct names out of drive, snip, grasp"),
        ("--data imagefolder", "--data-dir must be given with --data imagefolder, got nothing"),
        ("--data imagefolder --data-dir nowhere", "--data-dir must be a folder with train/<class>/*"),
        ("--data-dir here", "--data-dir must be left out with --data digits, got "),
        ("--out /dev/null/run", "--out must be a writable folder, got /dev/null/run (Not a directory)"),
        ("--resume", "--resume must have a run to continue, got none in runs/prune*"),
        ("--resume --out nothing", "--out must hold a run to resume, got nothing (no config.json)"),
        ("--quick", "No such option: --quick"),
        ("--lr", "Option '--lr' requires an argument."),
        ("surplus", "Got unexpected extra argument"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    assert rejected(capsys, f"prune {options}").startswith(message)
    assert not list(Path().rglob("config.json"))  # what was rejected is no run


def test_bad_input_in_a_process_of_its_own() -> None:
    result = python("-m", "drive", "prune", "--sparsities", "1.3")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command" in rejected(capsys, "grow")


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    line = rejected(capsys, "prune")
    assert line.startswith(f"{module} must be installed (pip install 'drive-prune[experiments]')")


def test_missing_torchvision(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "torchvision"] + ["torchvision"]:
        monkeypatch.setitem(sys.modules, loaded, None)
    line = rejected(capsys, "prune --model resnet18")
    assert line.startswith("torchvision must be installed (pip install 'drive-prune[vision]')")


@needs_digits
def test_train_dense_then_sparse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--out", "dense"]) == 0
    state = torch.load("dense/checkpoint.pt", weights_only=True)
    masks = drive.Masks({
        name: torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.1
        for name, x in state["model"].items() if name.endswith("weight") and x.dim() > 1
    })  # fmt: skip
    masks.save("masks.safetensors")
    options = ["--masks", "masks.safetensors", "--init", "dense/checkpoint.pt"]
    assert main(["train", *TINY, *options, "--out", "sparse"]) == 0
    weights = torch.load("sparse/checkpoint.pt", weights_only=True)["model"]
    assert not any(weights[name][~mask].any() for name, mask in masks.items())
    report = json.loads(Path("sparse/report.json").read_text())
    assert report["sparsity"] == masks.sparsity()
    summary = masks.summary(Network("small_cnn", 10, 1, 8).build(), torch.zeros(1, 1, 8, 8))
    assert summary.endswith(f"{report['macs_left']:.2%}")
    assert json.loads(Path("dense/report.json").read_text())["macs_left"] == 1
    assert "% of the multiply-adds left; results in" in " ".join(capsys.readouterr().out.split())


@needs_digits
def test_train_to_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--macs", "0.2", "--alpha", "0.5"]
    assert main(["train", *TINY, *options, "--out", "run"]) == 0
    report = json.loads(Path("run/report.json").read_text())
    assert 0.19 < report["macs_left"] <= 0.2
    masks, before = (
        drive.Masks.load("run/masks.safetensors"),
        Path("run/masks.safetensors").stat().st_mtime_ns,
    )
    weights = torch.load("run/checkpoint.pt", weights_only=True)["model"]
    assert not any(weights[name][~mask].any() for name, mask in masks.items())
    Path(
        "run/checkpoint.pt"
    ).unlink()  # as if it had been killed after pruning: trained again, to the same end
    assert main(["train", "--resume", "--out", "run"]) == 0
    assert Path("run/masks.safetensors").stat().st_mtime_ns == before
    again = torch.load("run/checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert rejected(capsys, "train --macs 0.2 --masks m.safetensors").startswith(
        "--macs must be left out with --masks"
    )
    assert rejected(capsys, "train --alpha 1").startswith("--alpha must be left out without --macs")

    masks.save("intact")
    Path("broken").write_bytes(Path("intact").read_bytes()[:40])
    drive.Masks({"other.weight": torch.ones(3, 3, dtype=torch.bool)}).save("other")
    drive.Masks({"conv1.weight": torch.ones(3, 3, dtype=torch.bool)}).save("misshapen")
    capsys.readouterr()
    for bad in ("broken", "other", "misshapen", "missing"):
        assert rejected(capsys, f"train --masks {bad}").startswith(
            "--masks must be a masks file of small_cnn"
        )
    assert rejected(capsys, "train --init missing").startswith("--init must be a checkpoint file")
    assert rejected(capsys, "train --init broken").startswith("--init must be a checkpoint file")
    torch.save({"model": {"weight": torch.ones(2)}}, "foreign.pt")
    assert rejected(capsys, "train --init foreign.pt").startswith("--init must be the weights of")


def test_devices_that_cannot_do_it() -> None:
    with pytest.raises(InputError, match="--device must be cpu with --sparse-ops, got cuda"):
        Compute("cuda", sparse_ops=True)
    with pytest.raises(InputError, match=r"--devices must be at most -?\d+ from cuda:1 on, got 99"):
        Compute("cuda:1", devices=99)


@needs_digits
@pytest.mark.usefixtures("short_turns")
def test_sparse_ops_and_sparse_bench(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prune", *TINY_PRUNE, "--sparse-ops", "--methods", "drive,rigl", "--out", "run"]
    assert main(command) == 0
    assert json.loads(Path("run/config.json").read_text())["options"]["sparse_ops"] is True
    assert "training on the sparse ops" in Path("run/tables.md").read_text()
    found = ["sparse-bench", "--checkpoint", "run/checkpoint.pt", "--batch-size", "2"]
    assert main([*found, "--masks", "run/masks.safetensors", "--out", "bench"]) == 0
    assert main(found) == 0  # zeros are the mask
    saved = json.loads(Path("bench/sparse.json").read_text())
    masks = drive.Masks.load("run/masks.safetensors")
    for mode in ("inference", "training"):
        layers = {layer["name"]: layer["density"] for layer in saved[mode]["choices"]}
        assert layers == {n.removesuffix(".weight"): float(m.float().mean()) for n, m in masks.items()}
        assert Path(f"bench/{mode}.png").read_bytes().startswith(b"\x89PNG")
    assert saved["race"]["seconds"].keys() >= {"ours", "torch"}
    shown = capsys.readouterr().out
    assert "whole model: " in shown and "training, 2 images a batch" in shown


@needs_digits
def test_train_resumes_to_the_bit() -> None:
    assert main(["train", *TINY, "--out", "whole"]) == 0
    report = Path("whole/report.json").read_bytes()
    assert main(["train", *TINY]) == 0  # into runs/train
    Path("runs/train/report.json").unlink()
    assert main(["train", "--resume"]) == 0
    assert Path("runs/train/report.json").read_bytes() == report


@needs_digits
def test_default_folders_and_conflicting_options(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["prune", *TINY_PRUNE, "--methods", "snip"]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["prune", "prune-2"]
    reports = [Path(f"runs/{name}/report.json").read_bytes() for name in ("prune", "prune-2")]
    assert reports[0] == reports[1]
    assert "DRIVE and SNIP were not compared" in " ".join(capsys.readouterr().out.split())

    Path("runs/prune-2/report.json").unlink()
    assert main(["prune", "--resume", "--epochs", "2"]) == 0  # the latest; an option that agrees
    assert Path("runs/prune-2/report.json").read_bytes() == reports[0]
    capsys.readouterr()
    line = rejected(capsys, "prune --resume --epochs 3")
    assert line == "--epochs must be 2 as in runs/prune-2, got 3; what may change: --lr"
    line = rejected(capsys, "prune --out runs/prune")
    assert line.startswith(
        "--out must be a folder without a run, got runs/prune, which holds one: give another, "
    )
    assert rejected(capsys, "train --resume --out runs/prune").startswith(
        "--out must hold a run of `drive train`"
    )
    Path("runs/prune/config.json").write_text("{")
    assert rejected(capsys, "prune --resume --out runs/prune").startswith(
        "runs/prune/config.json must be a file"
    )


def test_prune_on_an_image_folder_with_a_corrupt_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "photos", count=6)
    (folder / "train/red/2.png").write_bytes(b"broken")
    options = ["--data", "imagefolder", "--data-dir", "photos", "--model", "small_cnn", "--out", "run"]
    assert main(["prune", *TINY_PRUNE, "--limit-train", "100", "--batch-size", "4", *options]) == 0
    assert "left out 1 file (broken or no image): train/red/2.png" in capsys.readouterr().out
    report = json.loads(Path("run/report.json").read_text())
    assert (
        report["images"]["skipped"] == [["train/red/2.png", "broken or no image"]]
        and report["images"]["train"] == 11
    )


@needs_digits
def test_interrupted_by_ctrl_c() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "drive", "prune", "--out", "run"], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # a shell that starts the tests in the background has it ignored, and Python leaves it so
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(Path("run").glob("cells/*/log.csv")):  # that is, it trains
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    # a shell's $? is 130 either way: where the signal hits code that a string is being executed from
    # (dataclasses do so while modules are imported), CPython ends by the signal itself after all is done
    assert process.returncode in (130, -signal.SIGINT)
    assert complaint == "drive prune: interrupted; go on with: drive prune --resume --out run\n"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["drive::prune_"]) == {"cpu", "cuda"}
    compiled = drive_kernels._C is not None
    assert facts["drive::prune_"]["cpu"].startswith("compiled" if compiled else "reference")
    assert facts["build"]["compiled kernels"].startswith("yes" if compiled else "no: ")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert all(section in shown for section in facts)


@pytest.mark.parametrize("command", ["prune", "train", "info", "bench", "sparse-bench"])
def test_help_shows_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Examples" in shown and f"drive {command}" in shown


def test_without_a_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "prune" in capsys.readouterr().out


def test_import_drive_stays_light() -> None:
    heavy = ("torchvision", "matplotlib", "sklearn", "typer", "rich", "PIL")
    result = python("-c", f"import sys, drive; print([m for m in {heavy} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr

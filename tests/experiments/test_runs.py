"""Run folders: one process's, with what was read checked, and ways out said."""

import json
import os
import shlex
import shutil
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from images import image_folder

import drive
from drive.experiments.cli.app import main
from drive.experiments.runs.folder import open_run
from drive.experiments.runs.inputs import InputError
from drive.experiments.runs.locks import LOCK, locked

pytest.importorskip("lightning", reason="networks are trained on lightning's Fabric")

pytestmark = pytest.mark.usefixtures("in_empty_folder")

SMALL = ["--data", "imagefolder", "--data-dir", "photos", "--model", "mlp", "--epochs", "2"]
SMALL += ["--batch-size", "8", "--lr", "0.01", "--out", "run"]
TRAIN = ["train", *SMALL]
ONE_CELL = ["--warmup-epochs", "1", "--iterations", "1", "--methods", "snip", "--sparsities", "0.5"]
PRUNE = ["prune", *SMALL, *ONE_CELL]


def said(capsys: pytest.CaptureFixture[str], words: list[str], status: int = 2) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(words) == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


def state(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


def killed_after_an_epoch(folder: Path) -> None:
    """As far as the files of a training tell."""
    found = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({**found, "history": found["history"][:1]}, folder / "checkpoint.pt")
    (folder / "report.json").unlink()


# ---- two at once


def test_a_folder_is_one_process_s_from_the_first_file_on(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    image_folder(Path("photos"), count=8)
    with locked(Path("run")) as mine:
        assert mine
        for words in (TRAIN, PRUNE):
            assert said(capsys, words).endswith("got run, in which another process is at work")
        assert os.listdir("run") == [LOCK]
    assert main(TRAIN) == 0
    before = state(Path("run"))
    with locked(Path("run")):
        assert "must be no other process's, got run" in said(capsys, ["train", "--resume", "--out", "run"])
    assert state(Path("run")) == before


def test_automatic_names_never_collide() -> None:
    count = 12
    together, folders = threading.Barrier(count), list[Path]()

    def work(number: int) -> None:
        together.wait()
        with open_run("train", None, False, {"seed": number}, dict) as run:
            run.keep({})
            folders.append(run.folder)
            together.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == count
    seeds = {json.loads((folder / "config.json").read_text())["options"]["seed"] for folder in folders}
    assert seeds == set(range(count))


def test_a_folder_that_was_given_up_is_not_taken_for_locked() -> None:
    Path("folder").mkdir()
    with locked(Path("folder")) as first:
        assert first
        (Path("folder") / LOCK).unlink()  # as is done where nothing was written
        with locked(Path("folder")) as second:
            assert second


def test_a_folder_into_which_nothing_was_written_goes_again(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own").mkdir()
    for out in ("made", "own"):
        said(capsys, ["train", "--data", "imagefolder", "--data-dir", "nowhere", "--out", out])
    assert [p.name for p in Path().iterdir()] == ["own"]


# ---- what was read


@pytest.mark.parametrize("words", [TRAIN, PRUNE], ids=lambda words: words[0])
def test_other_images_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("photos"), count=8)
    assert main(words) == 0
    before = state(Path("run"))
    resume = [words[0], "--resume", "--out", "run"]
    shutil.rmtree("photos")
    image_folder(Path("photos"), count=8, shade=100)
    assert "--data must be what run was started with, got other images" in said(capsys, resume)
    Path("photos").rename("moved")
    line = said(capsys, resume)
    assert "--data-dir must be what run was started with, got " in line and "say where to" in line
    assert "got other images" in said(capsys, [*resume, "--data-dir", "moved"])
    assert state(Path("run")) == before


@pytest.mark.parametrize("words", [TRAIN, PRUNE], ids=lambda words: words[0])
def test_a_folder_that_moved_is_named_anew(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("photos"), count=8)
    assert main(words) == 0
    Path("run/report.json").unlink()
    shutil.copytree("photos", "moved")  # other times
    shutil.rmtree("photos")
    assert main([words[0], "--resume", "--out", "run", "--data-dir", "moved"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["options"]["data_dir"] == str(Path("moved").resolve())
    assert config["changed"] == [{"data_dir": str(Path("photos").resolve())}]
    assert main([words[0], "--resume", "--out", "run"]) == 0


def test_other_masks_and_weights_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("photos"), count=8)
    assert main(TRAIN) == 0
    Path("run").rename("first")
    weights = torch.load("first/checkpoint.pt", weights_only=True)["model"]
    for path, share in (("masks", 0.5), ("others", 0.4)):
        draw = torch.Generator().manual_seed(0)
        matrices = {name: weight for name, weight in weights.items() if weight.dim() > 1}
        drive.Masks({n: torch.rand(w.shape, generator=draw) > share for n, w in matrices.items()}).save(path)
    shutil.copy("first/checkpoint.pt", "weights")
    assert main([*TRAIN, "--masks", "masks", "--init", "weights"]) == 0
    resume = ["train", "--resume", "--out", "run"]
    assert main(resume) == 0
    assert "--masks must be what run was started with" in said(capsys, [*resume, "--masks", "others"])
    assert main([*resume, "--init", "first/checkpoint.pt"]) == 0  # the same bytes elsewhere
    torch.save({"model": weights, "note": "another"}, "first/checkpoint.pt")
    assert "--init must be what run was started with, got another file" in said(capsys, resume)
    shutil.copy("weights", "first/checkpoint.pt")
    shutil.copy("others", "masks")
    assert "--masks must be what run was started with, got another file" in said(capsys, resume)


def test_masks_cannot_join_later(capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("photos"), count=8)
    assert main(TRAIN) == 0
    assert "--masks must be None as in run" in said(
        capsys, ["train", "--resume", "--out", "run", "--masks", "x"]
    )


# ---- ways out


@pytest.mark.parametrize("words", [TRAIN, PRUNE], ids=lambda words: words[0])
def test_a_diverged_run_goes_on_with_another_rate(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(Path("photos"), count=8)
    bad = ["my run" if word == "run" else word for word in words]
    bad[bad.index("--lr") + 1] = "1e30"
    line = said(capsys, bad)
    hint = f"drive {words[0]} --resume --out 'my run' --lr"
    assert "--lr must be small enough to train" in line and f"go on with: {hint} LR" in line
    assert line.endswith("what may change: --lr, --data-dir")
    assert "--resume to go on with it" in said(capsys, bad)
    assert main([*shlex.split(hint)[1:], "0.01"]) == 0
    assert json.loads(Path("my run/report.json").read_text())["config"]["lr"] == 0.01
    assert json.loads(Path("my run/config.json").read_text())["changed"] == [{"lr": 1e30}]

    assert main(words) == 0  # the same as if it had never had the other one
    weights, others = (
        torch.load(f"{folder}/checkpoint.pt", weights_only=True)["model"] for folder in ("run", "my run")
    )
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


def test_the_rate_of_a_run_may_change_on_the_way() -> None:
    image_folder(Path("photos"), count=8)
    assert main(TRAIN) == 0
    first = Path("run/log.csv").read_text().splitlines()
    killed_after_an_epoch(Path("run"))
    assert main(["train", "--resume", "--out", "run", "--lr", "0.005"]) == 0
    then = Path("run/log.csv").read_text().splitlines()
    assert then[1] == first[1]
    before, after = (float(lines[2].split(",")[2]) for lines in (first, then))
    assert after == before / 2


def test_a_damaged_file_of_a_cell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("photos"), count=8)
    assert main(PRUNE) == 0
    (cell,) = Path("run/cells").glob("*snip*")
    for name in ("result.json", "pruned.pt", "training.pt"):
        (cell / "result.json").unlink(missing_ok=True)
        for content in (b"", b'{"format": "drive.result.v0"}'):
            (cell / name).write_bytes(content)
            line = said(capsys, ["prune", "--resume", "--out", "run"])
            assert f"{cell / name} must be a" in line and "delete it, and its work is done again" in line
        (cell / name).unlink()
    Path("run/cells/imagefolder.json").write_text("")
    line = said(capsys, ["prune", "--resume", "--out", "run"])
    assert "run/cells/imagefolder.json must be a file of the format" in line
    Path("run/cells/imagefolder.json").unlink()
    assert main(["prune", "--resume", "--out", "run"]) == 0


def test_a_run_of_another_version(capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("photos"), count=8)
    assert main(TRAIN) == 0
    path = Path("run/config.json")
    config = json.loads(path.read_text())
    resume = ["train", "--resume", "--out", "run"]
    for changed in ({**config, "format": "drive.run.v0"}, {**config, "options": {}}, {}, []):
        path.write_text(json.dumps(changed))
        line = said(capsys, resume)
        assert "run/config.json must be a file of the format drive.run.v1" in line and "--out another" in line
    path.unlink()
    path.mkdir()
    assert "must be a regular file" in said(capsys, resume)


def test_options_of_another_version() -> None:
    with ExitStack() as stack:
        run = stack.enter_context(open_run("train", Path("run"), False, {}, lambda given: {"lr": 1, **given}))
        run.keep({})
    with pytest.raises(InputError, match="must hold a run of this version of drive, got run"):
        stack.enter_context(open_run("train", Path("run"), True, {}, lambda given: {"lr": 1, "new": 2}))

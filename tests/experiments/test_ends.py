"""Commands that are not let finish, and output that nobody takes."""

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from images import image_folder
from processes import environment

from drive.experiments.bench import page, step
from drive.experiments.cli.app import main
from drive.experiments.cli.ends import Outlet, outlets, signals_interrupt
from drive.experiments.paper.trainer import CellRun
from drive.experiments.training import command

pytest.importorskip("lightning", reason="networks are trained on lightning's Fabric")

pytestmark = pytest.mark.usefixtures("in_empty_folder")

TRAIN = ["train", "--data", "imagefolder", "--data-dir", "photos", "--model", "mlp", "--batch-size", "8"]
TRAIN += ["--epochs", "2", "--out"]


def started(words: list[str], **streams: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "drive", *words], env=environment(OMP_NUM_THREADS="1"), text=True,
        preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGHUP, signal.SIGTERM)],
        **streams,
    )  # type: ignore[call-overload, no-any-return] # fmt: skip


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_like_ctrl_c(number: signal.Signals, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """In the middle of a training: what was done is there, and the last line goes on with it."""
    image_folder(Path("photos"), count=8)
    whole = command.train

    def ended(*arguments: object, **options: object) -> object:
        whole(*arguments, **options)  # type: ignore[arg-type]
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(command, "train", ended)
    before = signal.getsignal(number)
    assert main([*TRAIN, "my run"]) == 128 + number
    hint = "drive train --resume --out 'my run'"
    assert capsys.readouterr().err == f"drive train: interrupted ({number.name}); go on with: {hint}\n"
    assert signal.getsignal(number) == before
    monkeypatch.setattr(command, "train", whole)
    assert main(shlex.split(hint)[1:]) == 0
    assert Path("my run/report.json").exists()


def test_signals_that_somebody_decided_on_stay() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_a_thread_there_are_no_signals() -> None:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(main([])))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_processes_that_share_a_training_end_with_it() -> None:
    image_folder(Path("photos"), count=8)
    words = [*TRAIN, "run", "--devices", "2", "--epochs", "100000"]
    process = started(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not Path("run/log.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, complaint = process.communicate(timeout=60)  # the pipe is open as long as one of them lives
    assert process.returncode == 128 + signal.SIGTERM
    assert complaint.splitlines()[-1].endswith("go on with: drive train --resume --out run")


def test_a_grid_s_finished_cells_stand_on_the_page(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, run = [], CellRun.run

    def at_most_two(self: CellRun) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(self.cell)
        return run(self)

    monkeypatch.setattr(CellRun, "run", at_most_two)
    words = ["table1", "--rows", "cifar10-mlp", "--methods", "snip", "--sparsities", "0.5", "--seeds", "2"]
    words += ["--scale", "0.07", "--data-dir", str(images), "--out", "paper"]
    assert main(words) == 130
    output = capsys.readouterr()
    assert "2 of 4 cells are finished" in output.out and Path("paper/table1.md").exists()
    assert output.err == "drive table1: interrupted; the same command goes on\n"
    monkeypatch.setattr(CellRun, "run", run)
    assert main(words) == 0
    assert "4 of 4 cells are finished" in capsys.readouterr().out


def test_what_a_benchmark_has_measured_is_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*_: object) -> object:
        yield SimpleNamespace(as_dict=lambda: {"row": 1})
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "run", rows)
    monkeypatch.setattr(page, "table", lambda row: "a table")
    assert main(["bench", "--out", "bench"]) == 130
    output = capsys.readouterr()
    assert "a table" in output.out and output.err == "drive bench: interrupted\n"
    assert '"row": 1' in Path("bench/bench.json").read_text()


# ---- output


@pytest.mark.parametrize("to", ["| true", ">&- 2>&-"])
def test_all_is_written_when_nobody_reads(to: str) -> None:
    image_folder(Path("photos"), count=8)
    words = shlex.join([sys.executable, "-m", "drive", *TRAIN, "run"])
    done = subprocess.run(
        ["bash", "-c", f"{words} {to}; exit ${{PIPESTATUS[0]}}"],
        env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Path("run/report.json").exists()


def test_output_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main([]) == 1
    assert "output could not be written: [Errno 28]" in capsys.readouterr().err


def test_an_outlet_goes_on_without_its_reader() -> None:
    reads, writes = os.pipe()
    outlet = Outlet(os.fdopen(writes, "w"))
    outlet.write("before")
    outlet.flush()
    os.close(reads)
    for _ in range(3):
        assert outlet.write("after") == 5
        outlet.flush()
    assert isinstance(outlet.error, BrokenPipeError)
    outlet.close()  # which Python does when it ends


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, "utf-8"))
    with outlets():
        print("─ é")
        print("caf\udce9", file=sys.stderr)
    assert raw.getvalue() == b"\\u2500 \\xe9\ncaf\\udce9\n"

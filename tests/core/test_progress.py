"""What drive.prune tells of its progress: on stderr alone, and to a terminal alone."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import drive
from drive import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=("rich", "no rich"))
def rich(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if request.param == "rich":
        pytest.importorskip("rich")
    else:
        for loaded in [name for name in sys.modules if name.partition(".")[0] == "rich"] + ["rich"]:
            monkeypatch.setitem(sys.modules, loaded, None)
    return request.param == "rich"


def prune() -> drive.Masks:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 5), torch.randint(3, (4,)))]
    return drive.prune(nn.Linear(5, 3), batches, nn.functional.cross_entropy, sparsity=0.8, iterations=3)


def test_a_terminal_is_told(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "SECONDS", 0)
    assert prune().sparsity() == 0.8
    told = sys.stderr.getvalue()
    if rich:
        assert "drive to 80.00%" in told and "━" in told and "100%" in told
    else:
        assert told.splitlines() == [f"drive to 80.00%: {done} of 3, 0 s" for done in (1, 2, 3)]
    assert capsys.readouterr().out == ""


def test_a_short_loop_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.tracked("abc", "letters")) == ["a", "b", "c"]
    assert sys.stderr.getvalue() == "letters: 3 of 3, 0 s\n"


@pytest.mark.parametrize("stderr", (io.StringIO(), None), ids=("a file", "closed"))
def test_nobody_else_is(
    rich: bool,
    stderr: io.StringIO | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    assert prune().sparsity() == 0.8
    assert stderr is None or stderr.getvalue() == ""
    assert capsys.readouterr().out == ""

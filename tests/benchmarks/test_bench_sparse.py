"""The benchmark of sparse layers: what it writes, what it measures again, which measurement it keeps."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
from torch import nn

from benchmarks import ROOT
from benchmarks.cpu.sparse import measure, report
from benchmarks.cpu.sparse.rows import MEASURED, Row, Rows, read


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.fixture
def quick(monkeypatch):
    """Small networks, and three turns a measurement."""
    monkeypatch.setattr("drive.sparse.measure.MODEL_SECONDS", 0.0)
    monkeypatch.setattr("drive.sparse.measure.SECONDS", 0.0)
    monkeypatch.setattr(measure, "NETWORK_SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.cpu.sparse.rows.version", lambda: "abc1234")
    monkeypatch.setitem(measure.NETWORKS, "tiny", (tiny, (3, 8, 8)))
    monkeypatch.setitem(measure.NETWORKS, "tiny mlp", (lambda: nn.Sequential(nn.Linear(64, 32)), (64,)))


def networks(path: Path, *names: str) -> list[Row]:
    measure.networks(Rows(path), [0.5, 0.98], [16], list(names), [])
    return read(path)


def test_networks(quick, tmp_path: Path):
    rows = networks(tmp_path / "rows.jsonl", "tiny", "tiny mlp")
    found = {(row.name, row.sparsity, row.mode): set(row.seconds) - {"ours, first"} for row in rows}
    modes = ("inference", "training step")
    assert list(found) == [(n, s, m) for n in ("tiny", "tiny mlp") for m in modes for s in (0.5, 0.98)]
    always = {"dense", "again", "ours"}
    assert found["tiny", 0.98, "inference"] == always | {"dense channels_last"}
    assert found["tiny mlp", 0.5, "inference"] == always | {"dense oneDNN", "MKL CSR"}
    assert found["tiny mlp", 0.5, "training step"] == always
    assert {row.commit for row in rows} == {"abc1234"}
    half, most = (row.seconds for row in rows[:2])
    assert half["dense"] == most["dense"] and half["ours"] != most["ours"]  # in the same turns


def test_layers(quick, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(measure, "LAYERS", ((8, 8),))
    monkeypatch.setattr(measure, "LAYER_SECONDS", 0.0)
    monkeypatch.setattr(measure, "TURN_SECONDS", 0.0)
    measure.layers(Rows(tmp_path / "rows.jsonl"), [0.5], [16])
    rows = read(tmp_path / "rows.jsonl")
    whats, modes = ["3x3 convolution", "3x3 convolution, in a row"], ["forward", "forward + backward"]
    assert [(row.what, row.mode) for row in rows] == [(what, mode) for mode in modes for what in whats]
    timed = {"dense", "again", "dense channels_last", "ours", "ours, blocked", "copy"}
    assert all(set(row.seconds) - {"SparseProp"} == timed for row in rows)
    assert all(seconds > 0 for row in rows for seconds in row.seconds.values())


def test_calls_in_a_row(monkeypatch):
    called: list[str] = []

    def measured(runs, seconds):
        for run in runs.values():
            run()
        return {"a": 6.0, "b": 1.0}

    monkeypatch.setattr(measure, "interleaved", measured)
    runs = {who: partial(called.append, who) for who in "ab"}
    assert measure.in_a_row(runs, {"a": 3, "b": 1}) == {"a": 2.0, "b": 1.0}
    assert called == ["a", "a", "a", "b"]


def test_rows_of_another_version_are_replaced(quick, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(measure, "interleaved", lambda runs, seconds: {who: next(clock) for who in runs})
    clock = itertools.count(100.0, 0.1)
    before = networks(tmp_path / "rows.jsonl", "tiny")
    assert networks(tmp_path / "rows.jsonl", "tiny") == before
    monkeypatch.setattr("benchmarks.cpu.sparse.rows.version", lambda: "def5678")
    after = networks(tmp_path / "rows.jsonl", "tiny")
    assert [row.key for row in after] == [row.key for row in before]
    assert {row.commit for row in after} == {"def5678"}


def test_a_version_is_of_code_that_there_is():
    """git is silent about a path that has moved."""
    assert all((ROOT / path).exists() for path in MEASURED)


def test_rows_of_a_disturbed_machine_are_measured_again(quick, tmp_path: Path, monkeypatch):
    again = iter([1.2, 1.0, 0.95])  # inference, the training step, and inference once more

    def measured(runs, seconds):
        return {who: next(again) if who == "again" else 1.0 for who in runs}

    monkeypatch.setattr(measure, "interleaved", measured)
    for expected in (1.2, 0.95, 0.95):
        rows = networks(tmp_path / "rows.jsonl", "tiny")
        assert [row.seconds["again"] for row in rows if row.mode == "inference"] == [expected] * 2
    assert {row.seconds["again"] for row in rows if row.mode == "training step"} == {1.0}


def test_csr_is_measured_apart_and_counted_against_the_same_dense_network(quick, tmp_path: Path, monkeypatch):
    def measured(runs, seconds):
        slower = any(who.startswith("MKL CSR") for who in runs)  # the host, meanwhile
        assert not (slower and any(who.startswith("ours") for who in runs))
        return {who: (2.0 if slower else 1.0) * (3.0 if who.startswith("MKL CSR") else 1.0) for who in runs}

    monkeypatch.setattr(measure, "interleaved", measured)
    rows = [row for row in networks(tmp_path / "rows.jsonl", "tiny mlp") if row.mode == "inference"]
    assert [row.seconds["MKL CSR"] for row in rows] == [3.0, 3.0]


def test_what_is_slower_than_dense_is_measured_again_and_that_counts(quick, tmp_path: Path, monkeypatch):
    asked = []

    def measured(runs, seconds):
        asked.append((seconds, set(runs)))
        alone = math.isinf(seconds)  # the host is slower meanwhile, and dense better in channels_last
        found = {"dense": 2.0, "dense channels_last": 1.6, "ours": 1.8} if alone else {"ours 0.5": 1.1}
        return {who: found.get(who, 1.0) for who in runs}

    monkeypatch.setattr(measure, "interleaved", measured)
    rows = networks(tmp_path / "rows.jsonl", "tiny")
    assert [row.speedup() for row in rows] == pytest.approx([1.6 / 1.8, 1, 1.6 / 1.8, 1])
    assert [row.seconds.get("ours, first") for row in rows] == [1.1, None, 1.1, None]
    page = report.page(rows, "figure.png")
    assert "that counts\n(2 of these, 0.909 to 0.909 at first: the" in page
    assert [runs for seconds, runs in asked if math.isinf(seconds)] == [
        {"dense", "dense channels_last", "ours"}
    ] * 2


def test_page(tmp_path: Path):
    dense = {"dense": 2.0, "again": 2.1}
    linear = {"dense": 1.0, "ours": 0.1, "MKL CSR": 0.2}
    rows = [
        Row("network", "net", 32, 0.98, "inference", {**dense, "ours": 0.5}, "sparse chains", "here", "aaa"),
        Row("network", "net", 32, 0.5, "inference", {**dense, "ours": 2.5}, "dense", "here", "bbb"),
        Row("linear", "8x8", 32, 0.98, "forward", linear, "", "here", "bbb"),
    ]
    page = report.page(rows, "figure.png")
    assert "- here, commit aaa: 1 rows\n- here, commit bbb: 2 rows" in page
    assert "| net, inference | 32 | 0.8 | 4 |" in page
    assert "1 of 2 figures are below 0.97, 1 of them of networks that it left dense" in page
    assert "| 8x8, forward | 32 | 5 / - |" in page
    report.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert report.page(rows[1:], "figure.png").split("\n\n")[1] == "here, commit bbb"

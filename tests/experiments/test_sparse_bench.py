"""`drive sparse-bench`: a sparse network's inference beside its rivals, and what the command rejects."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import drive
from drive.experiments.bench import inference, networks, rivals
from drive.experiments.bench.inference import Race
from drive.experiments.bench.turns import Spread, burst, in_turns, wait_until_idle
from drive.experiments.cli.app import main
from drive.experiments.runs.inputs import InputError
from drive.experiments.training.networks import Network

pytestmark = pytest.mark.usefixtures("in_empty_folder")


def tiny() -> tuple[nn.Module, drive.Masks]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    masks = networks.uniform_masks(model, 0.8)
    return networks.settle_(model, masks, (3, 8, 8)), masks


@pytest.mark.usefixtures("short_turns")
def test_of_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main(["sparse-bench", "small_cnn", "--sparsity", "0.8", "--batch-size", "2", "--out", "out"]) == 0
    race = json.loads(Path("out/sparse.json").read_text())["race"]
    assert race["seconds"].keys() == race["differences"].keys() >= {"ours", "torch", "torch channels_last"}
    assert race["seconds"].keys() | race["absent"].keys() == {"ours", *rivals.DENSE}
    assert max(race["differences"].values()) < inference.TOLERATED
    assert Path("out/race.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "80.0% pruned, 20.0% of the multiply-adds" in shown and "results in out" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "NETWORK or --checkpoint must be given, got neither"),
        ("small_cnn --checkpoint good", "NETWORK or --checkpoint must be given, got both"),
        ("nothing", "network must be one of resnet50, mobilenet_v2, vgg16, small_cnn, mlp,"),
        ("mlp --masks m", "--masks must be left out without --checkpoint, got m"),
        ("mlp --sparsity 1", "--sparsity must be a fraction in [0, 1), got '1'"),
        ("--checkpoint good --sparsity 0.5", "--sparsity must be left out with --checkpoint, got 0.5"),
        ("--checkpoint missing", "--checkpoint must be a checkpoint file, got missing (no such file)"),
        ("--checkpoint foreign", "--checkpoint must be one of `drive prune` or `drive train`, got foreign ("),
        ("--checkpoint good --masks foreign", "--masks must be a masks file of small_cnn, got foreign ("),
        ("--checkpoint good --batch-size 0", "--batch-size must be an integer >= 1, got '0'"),
    ],
)
def test_refuses(capsys: pytest.CaptureFixture[str], options: str, message: str) -> None:
    network = Network("small_cnn", 10, 1, 8)
    torch.save({"model": {"weight": torch.ones(2)}}, "foreign")
    torch.save({"network": network.as_dict(), "model": network.build().state_dict()}, "good")
    assert main(["sparse-bench", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"drive sparse-bench: {message}")


def test_networks_of_torchvision_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(InputError, match="torchvision must be installed"):
        networks.build("resnet50")


def test_a_settled_network_is_pruned_and_calm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(30) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))))
    before = model[0].weight.norm()
    masks = networks.uniform_masks(model, 0.5)
    assert model[0].weight.all()
    assert not networks.settle_(model, masks, (3, 80, 80)).training
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    torch.testing.assert_close(model[0].weight.norm(), before)
    assert 0.5 < model(torch.randn(4, 3, 80, 80)).std() < 2


@pytest.mark.parametrize("name", rivals.DENSE)
def test_rivals_agree(name: str) -> None:
    needed = {rivals.ONNX_RUNTIME: ("onnx", "onnxruntime"), rivals.OPENVINO: ("onnx", "openvino")}
    for module in needed.get(name, ()):
        pytest.importorskip(module)
    model, _ = tiny()
    example = networks.noise(2, (3, 8, 8))
    run = rivals.made(rivals.DENSE[name], model, example)
    assert not isinstance(run, str), run
    assert rivals.difference(run(), model(example).detach()) < 1e-5


def test_a_rival_that_is_not_there_or_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime" in str(rivals.made(rivals.onnx_runtime, model, networks.noise(1, (3, 8, 8))))
    assert "expected input" in str(rivals.made(rivals.contiguous, model, networks.noise(1, (4, 8, 8))))


def test_what_the_race_says_of_others() -> None:
    found = Race({}, {"A": 1e-6, "B": 0.5, "C": float("nan")}, {"D": "no module"})
    assert list(found.notes()) == [
        "D did not run: no module",
        "B computes something else: its output differs by 5.0e-01 of the largest",
        "C computes something else: its output differs by nan of the largest",
    ]


def test_milliseconds() -> None:
    assert [*map(inference.milliseconds, (0.00012345, 0.1, 0.9994, 0.9996, 12.3456))] == [
        "0.123", "100", "999", "1000", "12346",
    ]  # fmt: skip


def test_turns() -> None:
    called: list[str] = []
    times = {"a": iter([1.0, 3.0, 2.0]), "b": iter([5.0] * 3)}

    def run(name: str, seconds: float) -> float:
        assert seconds == 0.1
        called.append(name)
        return next(times[name])

    found = in_turns({n: lambda s, n=n: run(n, s) for n in "ab"}, 3, 0.1)
    assert found == {"a": Spread(2.0, 1.5, 2.5), "b": Spread(5.0, 5.0, 5.0)}
    assert all(set(called[i : i + 2]) == {"a", "b"} for i in (0, 2, 4))


def test_a_burst_is_the_median_of_timed_calls() -> None:
    calls = iter([0.05, *[0.002] * 100])
    assert 0.002 <= burst(lambda: time.sleep(next(calls)))(0.02) < 0.02
    assert burst(lambda: time.sleep(0.001))(0.0) >= 0.001


def test_waits_for_threads_that_spin() -> None:
    end = time.perf_counter() + 0.1
    thread = threading.Thread(target=lambda: all(iter(lambda: time.perf_counter() < end, False)))
    thread.start()
    wait_until_idle()
    assert time.perf_counter() >= end
    thread.join()

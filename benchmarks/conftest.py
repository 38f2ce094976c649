"""What `pytest benchmarks/` has in common: a device, sizes that suit it, a stopwatch that waits for it."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch

import drive
from benchmarks import pages
from benchmarks.sizes import SIZES, Size

Run = Callable[[], object]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--size", action="append", choices=SIZES, help="default: 11M, and on a CUDA device 138M as well"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        names = metafunc.config.getoption("size") or ["11M", "138M"][: 1 + torch.cuda.is_available()]
        metafunc.parametrize("size", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def size(request: pytest.FixtureRequest) -> Size:
    return SIZES[request.param]


@pytest.fixture(scope="session")
def device() -> str:
    torch.backends.cudnn.allow_tf32 = False  # else its float32 is off by a thousandth
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def facts(device: str) -> dict[str, str]:
    """What traces a figure to where it comes from."""
    threads = str(torch.get_num_threads())
    versions = {"drive": drive.__version__, "python": platform.python_version(), "threads": threads}
    return {**pages.facts(device), **versions}


@pytest.fixture
def timed(benchmark, device: str, facts: dict[str, str]) -> Callable[..., None]:
    """A function that times what `prepare` returns, called before every round, in a group of this name.

    Two rounds go before those that count, unless these are no more than three, which take seconds.
    """

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def timed(group: str, prepare: Callable[[], Run], rounds: int, entries: int) -> None:
        def setup() -> tuple[tuple[Run], dict[str, object]]:
            run = prepare()
            wait()
            return (run,), {}

        def finished(run: Run) -> object:
            found = run()
            wait()
            return found  # freed after the clock has stopped

        benchmark.group = group
        benchmark.extra_info.update(facts, entries=entries)
        benchmark.pedantic(finished, setup=setup, rounds=rounds, warmup_rounds=2 if rounds > 3 else 0)

    return timed

"""Tests marked `gpu` need a CUDA device; all of them say so in the same words where there is none.

Those marked `slow` are for `make test-all`.
"""

import os
from pathlib import Path

import pytest
import torch

# What fails within a helper's assertion is shown as it is in a test's.
pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "helpers").glob("*.py")))


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decoded images go to a folder of the tests' own, in the processes that they start too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

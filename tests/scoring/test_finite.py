"""Checks whose answers are taken later."""

from __future__ import annotations

import pytest
import torch

from drive._scoring.finite import FiniteCheck, LateChecks


def check(step: int, *nonfinite: int) -> FiniteCheck:
    sizes = dict.fromkeys("ab"[: len(nonfinite)], 10)
    return FiniteCheck(f"prune: iteration {step}", sizes, torch.tensor(nonfinite))


def test_names_the_first_tensor():
    check(1, 0, 0).answer()
    with pytest.raises(ValueError, match=r"^prune: iteration 3: non-finite score in b \(4 of 10 entries\)$"):
        check(3, 0, 4).answer()


def test_at_once():
    checks = LateChecks(steps_late=0)
    checks.add(check(1, 0))
    with pytest.raises(ValueError, match="iteration 2: non-finite score in a"):
        checks.add(check(2, 1))


@pytest.mark.parametrize("bad", (1, 2, 3))
def test_one_step_late(bad: int):
    checks = LateChecks(steps_late=1)
    raised_at = None
    for step in (1, 2, 3):
        try:
            checks.add(check(step, int(step == bad)))
        except ValueError as error:
            raised_at = step
            assert f"iteration {bad}" in str(error)
            break
    if bad == 3:
        assert raised_at is None
        with pytest.raises(ValueError, match="iteration 3"):
            checks.finish()
    else:
        assert raised_at == bad + 1

"""Adapters on a sharded base, in two real DeepSpeed processes under ZeRO-3, in fused blocks, gathered by phase and by block."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import results_of

DRIVER = Path(__file__).parents[1] / "drivers" / "lora_zero3.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(DRIVER, tmp_path_factory.mktemp("adapters"))


@pytest.mark.distributed
def test_each_role_is_what_it_is_on_one_process(results):
    assert len(results) == 4
    for case, result in results.items():
        assert result["fused"] >= 4 and result["sharded"] > 100, case
        assert result["output"] < 1e-5, case


@pytest.mark.distributed
def test_gradients_of_the_student(results):
    """Critic and teacher have been at work between its forward and its backward pass."""
    for case, result in results.items():
        assert result["gradient"] < 1e-5 and result["after"] < 1e-5, case


@pytest.mark.distributed
def test_gathered_saved_and_loaded(results):
    for case, result in results.items():
        assert result["loaded"] < 1e-5, case
        assert result["adapters_left"] == 0, case

"""Fused transformers in two real DeepSpeed processes under ZeRO-3, with this project's leaf blocks and without."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import results_of

DRIVER = Path(__file__).parents[1] / "drivers" / "fuse_zero3.py"


@pytest.fixture(scope="module")
def results():
    return results_of(DRIVER)


@pytest.mark.distributed
def test_outputs_and_gradients_are_the_stock_modules(results):
    """Fused before and after DeepSpeed is initialised, leaves or hooks on every module, with recomputation and without:
    in float32, chains of two passes, before and after an update."""
    assert len(results) == 9
    for case, result in results.items():
        assert result["output"] < 1e-5 and result["gradient"] < 1e-5, case
        assert result["stock"] == 0, f"{case}: it must be the fused forwards that ran"


@pytest.mark.distributed
def test_weights_are_given_back(results):
    for case, result in results.items():
        assert (result["kept"] == 0) == ("whole" not in case), case


@pytest.mark.distributed
def test_blocks_by_themselves(results):
    """Without leaves, outside a pass of the model, nothing gathers what a block reads of its modules: they are called."""
    for case, result in results.items():
        assert result["around"] < 1e-5, case


@pytest.mark.distributed
def test_fp8_follows_the_updates(results):
    """Passes without gradient are those of the same weights on one process, quantised anew after each update."""
    for case, result in results.items():
        assert result["no_grad"] < 1e-5, case
        assert (result["fp8"] > 1e-3) == ("fp8" in case), case

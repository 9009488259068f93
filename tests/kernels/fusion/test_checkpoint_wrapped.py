"""`selective_checkpoint` in two real processes under DDP, FSDP1, FSDP2 and ZeRO: the gradients of a model without."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import results_of

DRIVER = Path(__file__).parents[2] / "drivers" / "checkpoint_wrapped.py"
PASSES = 8  # two losses of two passes of two blocks


@pytest.fixture(scope="module")
def results():
    return results_of(DRIVER)


@pytest.mark.distributed
def test_gradients_are_the_plain_models(results):
    """Of every parameter, unless the backward pass refuses."""
    assert len(results) > 80
    for case, result in results.items():
        assert result["error"] < (2e-2 if "bfloat16" in case else 1e-5) and not result["missing"], case


@pytest.mark.distributed
def test_modules_whose_weights_are_swapped_inside(results):
    """Whole blocks, as diffusers checkpoints them, are left to torch's checkpoint; under the other wrappers they are
    kept."""
    for case, result in results.items():
        wrapper, how = case.split(": ")
        if how.startswith("module,"):
            kept = wrapper in ("fsdp2 of the root", "replicated blocks", "zero 1", "zero 2") or wrapper.startswith(
                "ddp"
            )
            assert result["left"] == (0 if kept else PASSES) and not result["refused"], case


@pytest.mark.distributed
def test_attention_is_kept_inside_the_hooks(results):
    """Of wrappers that put parameters there, not views."""
    for case, result in results.items():
        if "inside_module" in case:
            assert (result["left"] > 0) == case.startswith(("fsdp1", "zero 3")), case
            assert not result["refused"], case


@pytest.mark.distributed
def test_parameters_that_are_none_are_refused(results):
    """Those that fully_shard and flat parameters have taken the place of, and views that no parameter stands for."""
    refused = {case for case, result in results.items() if result["refused"]}
    assert refused == {
        case
        for case in results
        if (": inside," in case and (case.startswith("fsdp2") or "flat" in case))
        or case.startswith("fsdp1 of the root, flat: function")
    }

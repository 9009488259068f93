"""What the engine takes of DeepSpeed's inside: the version, the names, and that they stand in one module."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from dpdmd.config import ConfigError
from dpdmd.engine import deepspeed

DPDMD = Path(__file__).parents[2] / "dpdmd"


def test_the_installed_version_is_known():
    deepspeed.check()
    deepspeed.check_names()


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "0.20.0+cu130", "1.0"])
def test_another_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    expected = rf"DeepSpeed {re.escape(version)} is installed; 0\.19 or newer and below 0\.20 is needed"
    with pytest.raises(ConfigError, match=expected):
        deepspeed.check()


def test_a_name_that_has_gone_is_named(monkeypatch):
    monkeypatch.delattr(DeepSpeedZeroOptimizer_Stage3, "_set_fp32_optimizer_param_groups")
    expected = (
        r"its DeepSpeedZeroOptimizer_Stage3 has no _set_fp32_optimizer_param_groups, which the engine uses; 0\.19 has"
    )
    with pytest.raises(ConfigError, match=expected):
        deepspeed.check_names()


def test_its_inside_is_touched_in_one_module():
    private = r"\.ds_(?!config)\w+|fp(16|32)_partitioned|lp_param_buffer|_original_parameters|optimizer_swapper|ZeroParamStatus"
    found = {path.name for path in DPDMD.rglob("*.py") if re.search(private, path.read_text(encoding="utf-8"))}
    assert found == {"deepspeed.py"}

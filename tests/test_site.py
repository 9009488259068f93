"""What docs/hooks.py makes for the documentation's site: the references are whole, and links lead to what is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import dpdmd.kernels
from dpdmd.config import known_keys

for package in ("mkdocs", "griffe"):
    pytest.importorskip(package, reason="the site's tools are not installed: pip install -e '.[docs]'")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_has_a_row(hooks):
    text = hooks.settings()
    rows = {
        name: [cell.strip() for cell in rest.split(" | ")]
        for name, rest in re.findall(r"^\| `([\w.]+)` \| (.*) \|$", text, re.MULTILINE)
    }
    sections = re.findall(r"^## ([\w.]+)$", text, re.MULTILINE)
    assert sorted([*rows, *sections]) == sorted(known_keys()) and "distill.renoise" in sections
    assert all(len(cells) == 3 and cells[2] for cells in rows.values())
    assert rows["distill.normalizer"][:2] == ["`teacher`", "`teacher`, `sample`, `none`"]
    assert rows["distill.renoise.high"][:2] == ["`0.98`", "number from 0.001 to 1"]
    assert rows["ema.decay"][:2] == ["`0.999`", "number above 0 to 0.99999"]
    assert rows["student_optimizer.betas"][:2] == ["`[0.9, 0.999]`", "2: number from 0 below 1"]
    assert rows["lora.alpha"][:2] == ["", "number from 0.001 to 1e+06 or `null`"]


def test_every_public_operation_is_there(hooks):
    found = re.findall(r"^::: dpdmd\.kernels\.(\w+)$", hooks.operations(), re.MULTILINE)
    assert sorted(found) == sorted(dpdmd.kernels.__all__)


def test_arguments_become_a_list(hooks):
    text = "Adds.\n\nx (B, ...): one, of\n    two lines.\ny, z: others\n\nnote: no argument\n"
    expected = "Adds.\n\n\n- **x (B, ...)**: one, of\n    two lines.\n- **y, z**: others\n\nnote: no argument"
    assert hooks.as_list(text, {"x", "y", "z"}) == expected


@pytest.mark.parametrize(
    ("page", "target", "path"),
    [
        ("index.md", "docs/demo.md", None),
        ("index.md", "dpdmd/config.py", "dpdmd/config.py"),
        ("kernels.md", "../benchmarks/results/kernels.json", "benchmarks/results/kernels.json"),
        ("kernels.md", "roofline.png", None),
        ("kernels.md", "../README.md", None),
        ("kernels.md", "https://arxiv.org/abs/2602.03139", None),
        ("kernels.md", "../benchmarks", None),
    ],
)
def test_files_that_the_site_takes_along(hooks, page, target, path):
    assert hooks.linked_file(target, page) == path


def test_links_lead_from_a_page_of_the_site(hooks):
    class Page:
        class file:
            src_uri = "index.md"

    text = "[a](docs/demo.md#x) [b](benchmarks/results/kernels.json) ![c](docs/demo-grid.png) [d](CHANGELOG.md) [e](https://f.g)"
    expected = "[a](demo.md#x) [b](files/benchmarks/results/kernels.json) ![c](demo-grid.png) [d](changelog.md) [e](https://f.g)"
    assert hooks.on_page_markdown(text, Page, None, None) == expected

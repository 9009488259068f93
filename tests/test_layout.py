"""The house: what may be called what, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest
from processes import ends, run_command

ROOT = Path(__file__).parents[1]
MODULES = [
    path.stem if path.is_file() else path.name for path in (ROOT / "dpdmd").iterdir() if not path.name.startswith("_")
]


def test_no_module_shadows_an_installed_name():
    """`deepspeed dpdmd/train.py` puts dpdmd/ first on sys.path: a module there would hide another of its name."""
    assert "train" in MODULES and "engine" in MODULES
    installed = set(importlib.metadata.packages_distributions()) - {"dpdmd"}
    # Packages that people have beside this one, installed here or not.
    known = {"evaluate", "datasets", "kernels", "wandb", "apex", "metrics", "clip", "types", "logging", "inspect"}
    assert not set(MODULES) & (installed | set(sys.stdlib_module_names) | known)


def test_kernels_import_torch_and_nothing_else_of_ours():
    code = (
        "import sys, dpdmd.kernels\n"
        "found = [name for name in ('deepspeed', 'diffusers', 'transformers', 'pydantic', 'yaml') if name in sys.modules]\n"
        "ours = [name for name in sys.modules if name.startswith('dpdmd') and not name.startswith('dpdmd.kernels')]\n"
        "print(found, ours)\n"
    )
    answer = run_command([sys.executable, "-c", code])
    assert answer.stdout.strip() == "[] ['dpdmd']", ends(answer.stdout, answer.stderr)


ALLOWED = {
    "command": set(),
    "opening": set(),
    "config": {"command", "opening"},
    "world": {"command", "config"},
    "stopping": {"command", "world"},
    "compilation": set(),
    "agreement": {"backbones", "config", "kernels", "prompts", "world"},
    "folder": {"command", "config", "files"},
    "shards": {"files", "kernels"},
    "diffusion": {"kernels"},
    "distill": {"config", "diffusion", "kernels"},
    "averaging": set(),
    "engine": {
        *(
            "averaging",
            "compilation",
            "config",
            "files",
            "kernels",
            "lora",
            "optimizer",
            "replay",
            "residency",
            "shards",
            "world",
        ),
    },
    "files": {"opening"},
    "lora": {"backbones", "config", "files"},
    "optimizer": {"kernels"},
    "replay": set(),
    "residency": set(),
    "prompts": {"config", "files"},
    "backbones": {"backbones", "config", "diffusion", "demo", "files", "opening"},
    "journal": {"config", "files"},
    "footprint": {"config", "kernels", "lora"},
    "budget": {"config", "footprint", "optimizer", "residency"},
    "plan": {"backbones", "budget", "command", "config"},
    "checkpoint": {"config", "distill", "engine", "files", "folder", "lora", "optimizer", "shards", "world"},
    "sample": {"agreement", "backbones", "checkpoint", "command", "config", "diffusion", "distill", "engine", "lora"},
}


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_go_one_way(name):
    path = ROOT / "dpdmd" / name
    files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module == "dpdmd":
                names = [f"dpdmd.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            imported |= {each.split(".")[1] for each in names if each.startswith("dpdmd.")}
    assert imported <= ALLOWED[name]

"""The house: what may be called what, and who may import whom."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest
from processes import ends, run_command

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["train.py", "plan.py", "sample.py"])
def test_no_module_hides_an_installed_one(command, tmp_path):
    """`deepspeed dpdmd/train.py` puts dpdmd/ first on sys.path, and a folder there has the name of another's package."""
    (tmp_path / "kernels.py").write_text("print('the installed one')")
    code = (
        f"import runpy, sys; sys.argv = ['{command}', '--help']; sys.path.insert(0, {str(ROOT / 'dpdmd')!r})\n"
        f"try:\n    runpy.run_path({str(ROOT / 'dpdmd' / command)!r}, run_name='__main__')\n"
        "except SystemExit:\n    import kernels\n"
    )
    answer = run_command(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT, *sys.path)))},
    )
    assert "usage:" in answer.stdout and answer.stdout.endswith("the installed one\n"), ends(
        answer.stdout, answer.stderr
    )


def test_kernels_import_torch_and_nothing_else_of_ours():
    code = (
        "import sys, dpdmd.kernels\n"
        "found = [name for name in ('deepspeed', 'diffusers', 'transformers', 'pydantic', 'yaml') if name in sys.modules]\n"
        "ours = [name for name in sys.modules if name.startswith('dpdmd') and not name.startswith('dpdmd.kernels')]\n"
        "print(found, ours)\n"
    )
    answer = run_command([sys.executable, "-c", code])
    assert answer.stdout.strip() == "[] ['dpdmd']", ends(answer.stdout, answer.stderr)


# A floor uses only floors below it; within one, modules may use one another.
FLOORS = (
    ("kernels",),
    ("command", "files"),
    ("config",),
    ("diffusion",),
    ("backbones",),
    ("distill",),
    ("engine",),
    ("planner",),
    ("run",),
    ("evaluation",),
    ("plan", "sample"),
    ("worlds",),
    ("trainer",),
    ("train",),
    ("__main__",),
)


def imported(file: Path) -> set[str]:
    """Names of dpdmd's modules, in full."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("dpdmd.")}


def test_the_floors_are_whole():
    modules = {path.relative_to(ROOT / "dpdmd").parts[0] for path in (ROOT / "dpdmd").rglob("*.py")} | {"kernels"}
    modules = {Path(name).stem for name in modules}
    assert {name for floor in FLOORS for name in floor} == modules - {"__init__"}


@pytest.mark.parametrize("name", [name for floor in FLOORS for name in floor])
def test_imports_go_one_way(name):
    path = ROOT / "dpdmd" / name
    below = {"dpdmd"}
    for floor in FLOORS:
        below |= set(floor)
        if name in floor:
            break
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        assert {each.split(".")[1] for each in imported(file)} <= below, file


def test_nothing_but_its_folder_knows_a_world_by_name():
    """Beside what is taken where nothing is given: the pipeline's default, and the configuration file's."""
    names = {path.name for path in (ROOT / "dpdmd" / "worlds").iterdir() if (path / "evaluation.py").exists()}
    assert names
    found = {}
    for file in (ROOT / "dpdmd").rglob("*.py"):
        if "worlds" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names:
                found[file.name] = found.get(file.name, 0) + 1
        assert not any(name.startswith("dpdmd.worlds.") for name in imported(file)), file
    assert found == {"config.py": 1}

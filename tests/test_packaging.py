"""What is installed: a wheel of the checkout, a wheel of the source distribution and an editable install hold all that the
package consists of, links included."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import ends, run_command

import dpdmd

ROOT = Path(__file__).parents[1]
BUILDS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "dpdmd", "kernels", "csrc", "configs")


def build(what: str, project: Path, folder: Path) -> Path:
    """The file that setuptools makes of a project, without nvcc."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    env = {**os.environ, "DPDMD_BUILD_CUDA": "0", "PYTHONPATH": ""}
    answer = run_command([sys.executable, "-c", code, folder], cwd=project, env=env)
    assert answer.returncode == 0, ends(answer.stdout, answer.stderr)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy with the links that it has, as building writes beside the sources; and with what work leaves in a checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    leave_out = shutil.ignore_patterns("__pycache__", "*.so")
    for name in BUILDS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=leave_out)
        else:
            shutil.copy(ROOT / name, folder)
    (folder / "kernels" / "runtime" / "_ops_of_other_sources.so").touch()
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


def tree() -> list[str]:
    """Every file of the package, seen through its links."""
    files = [Path(folder, name) for folder, _, names in os.walk(ROOT / "dpdmd", followlinks=True) for name in names]
    return sorted(
        file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts and file.suffix != ".so"
    )


def packed(wheel: Path) -> list[str]:
    """A wheel's files but its metadata, duplicates included."""
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    assert packed(wheel) == tree()
    assert wheel.name.endswith("-py3-none-any.whl")
    for part in ("kernels/attention/attention_times.json", "csrc/ops.cpp", "configs/demo.yaml", "py.typed"):
        assert f"dpdmd/{part}" in tree()


def test_a_wheel_of_the_source_distribution_is_the_same(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    (project,) = tmp_path.iterdir()
    (tmp_path / "made").mkdir()
    again = build("wheel", project, tmp_path / "made")
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert packed(again) == packed(wheel)
    assert all(first.read(name) == second.read(name) for name in packed(wheel))


# Where the packages are that dpdmd needs.
OTHERS = [path for path in sys.path if path and Path(path).resolve() != ROOT]


def answer_of(folder: Path, *arguments: object, start: str = "pass") -> str:
    """What Python prints that knows this folder and the packages that dpdmd needs, but no other dpdmd."""
    begin = f"import sys; sys.path[:0] = [{str(folder)!r}]; sys.path += {OTHERS}; {start}\n"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    answer = run_command([sys.executable, "-S", "-c", begin + "\n".join(map(str, arguments))], env=env)
    assert answer.returncode == 0, ends(answer.stdout, answer.stderr)
    return answer.stdout


USE = (
    "import dpdmd, dpdmd.config, dpdmd.kernels.attention.choice, dpdmd.kernels.runtime.build as build",
    "from dpdmd.__main__ import main",
    "print(dpdmd.__file__, dpdmd.kernels.__file__, build.SOURCES, dpdmd.config.DEFAULT_CONFIG)",
    "assert dpdmd.config.load_config().run.output_dir and build.file_name()",
    "main(['--version'])",
)


def test_what_a_wheel_installs_works(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    package = tmp_path / "dpdmd"
    files = f"{package}/__init__.py {package}/kernels/__init__.py {package}/csrc {package}/configs/demo.yaml"
    assert answer_of(tmp_path, *USE) == f"{files}\ndpdmd {dpdmd.__version__}\n"
    (metadata,) = tmp_path.glob("*.dist-info")
    assert metadata.name == f"dpdmd-{dpdmd.__version__}.dist-info"
    assert (metadata / "entry_points.txt").read_text() == "[console_scripts]\ndpdmd = dpdmd.__main__:main\n"


def test_an_editable_install_reads_the_checkout(checkout, tmp_path):
    zipfile.ZipFile(build("editable", checkout, tmp_path)).extractall(tmp_path)
    package, kernels = checkout / "dpdmd", checkout / "dpdmd" / "kernels"
    files = f"{package}/__init__.py {kernels}/__init__.py {checkout}/csrc {package}/configs/demo.yaml"
    found = answer_of(tmp_path, *USE, start=f"import site; site.addsitedir({str(tmp_path)!r})")
    assert found == f"{files}\ndpdmd {dpdmd.__version__}\n"

"""Diversity-preserved distribution matching distillation. The fused operations are `dpdmd.kernels`."""


def __getattr__(name: str) -> str:
    """`__version__`, which has one source, pyproject.toml, and is looked up when it is asked for."""
    if name != "__version__":
        raise AttributeError(f"module 'dpdmd' has no attribute {name!r}")
    import re
    from pathlib import Path

    # In a checkout the file itself: what is installed beside it may be another version.
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        found = re.search(r'^name = "dpdmd"\nversion = "(.+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    from importlib.metadata import version

    return version("dpdmd")

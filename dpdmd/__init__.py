"""Diversity-preserved distribution matching distillation. The fused operations are `dpdmd.kernels`."""


def __getattr__(name: str) -> str:
    """Looks up `__version__` on demand; its only source is pyproject.toml."""
    if name != "__version__":
        raise AttributeError(f"module 'dpdmd' has no attribute {name!r}")
    import re
    from pathlib import Path

    # A checkout's own file comes first: another version may be installed.
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        found = re.search(r'^name = "dpdmd"\nversion = "(.+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    from importlib.metadata import version

    return version("dpdmd")

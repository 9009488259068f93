"""Pages and files that mkdocs adds to the site, beside the pages of this folder.

Pages: README, CHANGELOG and CONTRIBUTING; the reference of settings, from the fields of dpdmd/config.py; the reference of
operations, from the public names of kernels/__init__.py (mkdocstrings inserts the docstrings). Files: those that a page links.
"""

from __future__ import annotations

import ast
import html
import os
import re
import sys
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files, config):
    pages = {page: (ROOT / name).read_text(encoding="utf-8") for name, page in PAGES.items()}
    for page, content in {**pages, "settings.md": settings(), "operations.md": operations()}.items():
        files.append(File.generated(config, page, content=content))
    linked = {linked_file(target, page.src_uri) for page in files.documentation_pages() for target in links(page)}
    for path in sorted(linked - {None}):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace links to files of the repository by links to the site's pages and files."""

    def replaced(match: re.Match) -> str:
        begin, target, end = match.groups()
        path = linked_file(target, page.file.src_uri)
        if path:
            return f"{begin}files/{path}{end}"
        where = in_repository(target, page.file.src_uri)
        return f"{begin}{PAGES.get(where) or where.removeprefix('docs/')}{end}" if where else match[0]

    return LINK.sub(replaced, markdown)


def links(page: File) -> list[str]:
    return [target for _, target, _ in LINK.findall(page.content_string)]


def in_repository(target: str, page: str) -> str | None:
    """A link's target as a path from the repository's root; None for a URL."""
    if "://" in target or target.startswith("mailto:"):
        return None
    folder = "" if page in PAGES.values() else "docs"
    return os.path.normpath(os.path.join(folder, target))


def linked_file(target: str, page: str) -> str | None:
    """The path of a linked file that is neither a page nor in docs/; None for other targets."""
    path = in_repository(target, page)
    added = path and path not in PAGES and not path.startswith("docs/") and (ROOT / path).is_file()
    return path if added else None


# Settings


def settings() -> str:
    sys.path.insert(0, str(ROOT))
    from dpdmd.config import Config

    schema = Config.model_json_schema()
    lines = [
        "# Settings",
        "",
        "A YAML file (see `configs/`) holds them by section. `section.key=value` on the command line overrides the file. "
        "`--dry-run` prints the resolved configuration.",
    ]
    return "\n".join([*lines, *section(schema, schema, ""), ""])


def section(schema: dict[str, Any], of: dict[str, Any], prefix: str) -> list[str]:
    """A table of a section's own settings, then the sections below it."""
    rows, below = [], []
    for name, field in of["properties"].items():
        inner = [each["$ref"] for each in (field, *field.get("anyOf", ())) if "$ref" in each]
        if inner:
            below += ["", f"## {prefix}{name}", ""]
            if text := field.get("description"):
                below += [f"{prose(text)} Default: `null`, off; `{name}: {{}}` takes the defaults below.", ""]
            below += section(schema, schema["$defs"][inner[0].rsplit("/", 1)[1]], f"{prefix}{name}.")
        else:
            value = "" if field["default"] is None else f"`{written(field['default'])}`"
            rows.append(f"| `{prefix}{name}` | {value} | {values(field)} | {prose(field['description'])} |")
    table = ["| setting | default | values | what it does |", "| --- | --- | --- | --- |", *rows] if rows else []
    return [*table, *below]


def prose(text: str) -> str:
    return html.escape(text, quote=False).replace("|", r"\|").replace("*", r"\*")


def written(value: Any) -> str:
    """A value as written in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return '""' if value == "" else f"{value}"


def values(field: dict[str, Any]) -> str:
    choices = [each for each in field.get("anyOf", field.get("oneOf", ())) if each]
    if choices:
        return " or ".join(values(each) for each in choices)
    if "enum" in field or "const" in field:
        return ", ".join(f"`{written(each)}`" for each in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        items = field.get("prefixItems") or [field["items"]]
        return f"{len(items) if 'prefixItems' in field else 'list'}: {values(items[0])}"
    if kind in ("integer", "number"):
        return ("whole number" if kind == "integer" else "number") + limits(field)
    return {"boolean": "`true`, `false`", "string": "text", "null": "`null`"}.get(kind, "mapping or file")


def limits(field: dict[str, Any]) -> str:
    low = max((field[each] for each in ("minimum", "ge") if each in field), default=None)
    high = min((field[each] for each in ("maximum", "le") if each in field), default=None)
    found = [f"from {low:g}"] if low is not None else []
    found += [f"above {field['exclusiveMinimum']:g}"] if "exclusiveMinimum" in field else []
    # Higher limits only catch typing errors.
    found += [f"to {high:g}"] if high is not None and high < 1e9 else []
    found += [f"below {field['lt']:g}"] if "lt" in field else []
    return " " + " ".join(found) if found else ""


# Operations


def operations() -> str:
    """A section for each folder of kernels/ with public names: its docstring, then the names."""
    lines = ["# Reference of the operations", "", "All are imported from `dpdmd.kernels`."]
    names: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.setdefault(node.module.split(".")[2], []).extend(alias.name for alias in node.names)
    for folder, found in names.items():
        about = ast.get_docstring(ast.parse((ROOT / "kernels" / folder / "__init__.py").read_text(encoding="utf-8")))
        lines += ["", f"## {folder}", "", about or ""]
        for name in found:
            lines += ["", f"::: dpdmd.kernels.{name}"]
    return "\n".join([*lines, ""])


class Arguments(griffe.Extension):
    """Makes a Markdown list of the docstring lines that begin with an argument's name."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            func.docstring.value = as_list(func.docstring.value, {parameter.name for parameter in func.parameters})


def as_list(text: str, parameters: set[str]) -> str:
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        head = re.match(r"([a-z]\w*)((?:, \w+)*(?: \([^)]*\))?): ", line)
        if head and head[1] in parameters:
            lines += [""] * (not inside)
            line, inside = f"- **{head[0].rstrip(': ')}**: {line[head.end() :]}", True
        elif not line.strip():
            inside = False
        lines.append(line)
    return "\n".join(lines)

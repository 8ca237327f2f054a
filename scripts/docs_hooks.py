"""Hooks of mkdocs: pages outside of docs/, the reference from the public names, and links that work here and on the site.

``CHANGELOG.md``, ``results/README.md`` and the results files have the same paths on the site as in the repository, so links to
them from docs/ lose their ``../``; links to the README lead to the overview.
"""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = ["CHANGELOG.md", "results/README.md", *(f"results/{path.name}" for path in (ROOT / "results").glob("*.json"))]
LINK = re.compile(r"\]\((?P<up>(?:\.\./)*)(?P<path>[^)#:]+)(?P<anchor>#[^)]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")

ROOMS = {
    "sanm": "SANM",
    "methods": "Methods",
    "functional": "Functions",
    "per_sample": "Per-sample state",
    "callbacks": "Callbacks",
    "data": "Data",
    "models": "Networks",
    "audit": "Audit",
}
"""Packages whose public names have a page of the reference, with its title."""

MODULES = ("batch", "predictor", "predictions", "sanm.mixin", "sanm.callback")
"""Modules on the last page of the reference."""


def public_names(room: str) -> list[str]:
    """Return the full names of what the ``__init__.py`` of a package imports, in alphabetical order."""
    tree = ast.parse((ROOT / "sanm_lightning" / room / "__init__.py").read_text(encoding="utf-8"))
    lines = [node for node in tree.body if isinstance(node, ast.ImportFrom) and "sanm_lightning" in str(node.module)]
    found = {alias.name: f"{line.module}.{alias.name}" for line in lines for alias in line.names}
    return [found[name] for name in sorted(found, key=str.lower) if found[name].count(".") > 2]


def reference() -> dict[str, str]:
    """Return the pages of the reference by path, as Markdown with the directives of mkdocstrings."""
    pages = {}
    for room, title in ROOMS.items():
        names = "".join(f"::: {name}\n\n" for name in public_names(room))
        pages[f"reference/{room}.md"] = f"# {title}: `sanm_lightning.{room}`\n\n{names}"
    modules = "".join(f"::: sanm_lightning.{name}\n\n" for name in MODULES)
    pages["reference/modules.md"] = f"# Batches, predictions, mixin and callback\n\n{modules}"
    return pages


def links_on_site(markdown: str, source: str) -> str:
    """Return a page with the links of the repository replaced by those of the site.

    Args:
        markdown: text of the page.
        source: path of the page on the site, such as ``methods/gce.md``.
    """
    depth = source.count("/")

    def on_site(found: re.Match[str]) -> str:
        up, path, anchor = found["up"].count("../"), found["path"], found["anchor"] or ""
        if path == "README.md" and up == depth + 1:
            path, up, anchor = "index.md", depth, ""
        elif path in OUTSIDE and up == depth + 1:
            up = depth
        elif path.startswith("docs/") and source in OUTSIDE:
            path = path.removeprefix("docs/")
        return f"]({'../' * up}{path}{anchor})"

    return LINK.sub(on_site, markdown)


def on_config(config: Any) -> Any:
    """List the pages of a folder in the navigation for ``folder/*``, and read the roles of docstrings as names."""
    from markdown.extensions import Extension
    from markdown.preprocessors import Preprocessor

    class Names(Preprocessor):
        def run(self, lines: list[str]) -> list[str]:
            return [ROLE.sub(r"`\1`", line) for line in lines]

    class Roles(Extension):
        def extendMarkdown(self, md: Any) -> None:  # noqa: N802  (name of Markdown)
            md.preprocessors.register(Names(md), "roles", 10)  # after fenced code, which is kept

    folders = {"methods/*": sorted(f"methods/{path.name}" for path in (ROOT / "docs" / "methods").glob("*.md"))}
    folders["reference/*"] = list(reference())
    config.nav = [_expanded(entry, folders) for entry in config.nav]
    config.markdown_extensions.append(Roles())
    return config


def _expanded(entry: Any, folders: dict[str, list[str]]) -> Any:
    if isinstance(entry, dict):
        return {title: _expanded(part, folders) for title, part in entry.items()}
    if isinstance(entry, list):
        return [page for part in entry for page in folders.get(str(part), [_expanded(part, folders)])]
    return entry


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and files outside of docs/, and the reference."""
    from mkdocs.structure.files import File

    added = {path: (ROOT / path).read_text(encoding="utf-8") for path in OUTSIDE} | reference()
    for path, content in added.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace the links of a page."""
    return links_on_site(markdown, page.file.src_uri)

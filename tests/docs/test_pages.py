"""Links, names and sentences of the documentation: everything that a page refers to exists."""

import ast
import importlib
import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from sanm_lightning import methods
from tests.docs.pages import FENCE, PAGES, ROOT

DOCS = ROOT / "docs"
HOOKS = runpy.run_path(str(ROOT / "scripts" / "docs_hooks.py"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
CONFIGS = {path.stem: path for path in (ROOT / "configs" / "method").glob("*.yaml")}


def text(path: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and mkdocs write them."""
    headings = re.findall(r"^#+ (.+)$", text(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def find(name: str) -> Any:
    """Import a full name: a module, or a class, function or method in a module."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "results" / "README.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_internal_link_and_anchor_resolves(page):
    for link in LINK.findall(text(page)):
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_a_missing_anchor_is_found(tmp_path):
    (tmp_path / "a.md").write_text("# One, two: `three`\n\n```\n# no heading\n```\n")
    assert anchors(tmp_path / "a.md") == {"one-two-three"}


def named_in(part: Any) -> list[str]:
    if isinstance(part, dict):
        return [name for value in part.values() for name in named_in(value)]
    return [name for value in part for name in named_in(value)] if isinstance(part, list) else [part]


def test_every_page_is_in_the_navigation_once():
    listed = named_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | {
        path for path in HOOKS["OUTSIDE"] if path.endswith(".md")
    }
    folders = {name.removesuffix("/*") for name in listed if name.endswith("/*")}
    assert sorted(name for name in listed if not name.endswith("/*")) == sorted(
        page for page in pages if page.rpartition("/")[0] not in folders
    )


def test_every_page_is_in_the_table_of_the_overview():
    linked = set(LINK.findall((DOCS / "index.md").read_text()))
    assert {path.name for path in DOCS.glob("*.md")} - {"index.md"} <= linked


def test_every_name_of_the_reference_exists():
    pages = HOOKS["reference"]()
    names = [name for page in pages.values() for name in re.findall(r"^::: (.+)$", page, re.MULTILINE)]
    assert len(names) == len(set(names)) > 100
    for name in names:
        assert inspect.getdoc(find(name)), name


def test_the_reference_has_all_public_methods():
    (page,) = (page for path, page in HOOKS["reference"]().items() if path == "reference/methods.md")
    for name, found in vars(methods).items():
        if inspect.isclass(found) and found.__module__.startswith("sanm_lightning.methods."):
            assert f"::: {found.__module__}.{name}\n" in page


@pytest.mark.parametrize(
    ("markdown", "source", "expected"),
    [
        ("[a](../README.md#x)", "options.md", "[a](index.md)"),
        (
            "[a](../../results/x.md) [b](../limits.md#c)",
            "methods/gce.md",
            "[a](../../results/x.md) [b](../limits.md#c)",
        ),
        ("[a](../CHANGELOG.md)", "index.md", "[a](CHANGELOG.md)"),
        ("[a](../results/digits.json)", "results.md", "[a](results/digits.json)"),
        ("[a](../docs/results.md)", "results/README.md", "[a](../results.md)"),
        ("[a](https://a.b/README.md) [b](#c)", "index.md", "[a](https://a.b/README.md) [b](#c)"),
    ],
)
def test_links_of_the_repository_lead_to_the_pages_of_the_site(markdown, source, expected):
    assert HOOKS["links_on_site"](markdown, source) == expected


def test_every_name_of_the_equations_computes_something():
    names = [name for name in CODE.findall(text(DOCS / "equations.md")) if re.fullmatch(r"[\w.]+", name)]
    names = [name if name.startswith("sanm_lightning") else f"sanm_lightning.sanm.{name}" for name in names]
    ours = {name for name in names if name not in ("sanm_lightning.sanm", "sanm_lightning.sanm.forward_features")}
    assert len(ours) > 20
    for name in ours:
        assert callable(find(name)), name


@pytest.mark.parametrize("number", [*range(1, 11), "objective"])
def test_the_equations_are_complete(number):
    assert re.search(rf"^\| {number} \| .+ \| .*`.+` ?.*\|$", (DOCS / "equations.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_method_has_a_page_with_its_class_config_functions_and_cost(method):
    page = (DOCS / "methods" / f"{method}.md").read_text()
    name = yaml.safe_load(CONFIGS[method].read_text())["model"]["class_path"]
    assert f"`{name}`" in page
    assert f"`configs/method/{method}.yaml`" in page
    assert re.search(r"^- (With SANM|Cost)", page, re.MULTILINE)
    for named in re.findall(r"`((?:functional|per_sample)\.\w+)", page):
        assert callable(find(f"sanm_lightning.{named}")), named


def test_a_page_of_a_method_is_linked_from_the_table_of_methods():
    linked = set(LINK.findall((DOCS / "methods.md").read_text()))
    for path in (DOCS / "methods").glob("*.md"):
        assert f"methods/{path.name}" in linked


def literals() -> list[str]:
    """Return all string literals of the package, with {} for values."""
    found = []
    for path in (ROOT / "sanm_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_sentences_of_the_troubleshooting_are_those_of_the_code():
    sentences = [code for code in CODE.findall(text(DOCS / "troubleshooting.md")) if code.startswith("expected ")]
    code = literals()
    assert len(sentences) >= 14
    for sentence in sentences:
        pattern = re.compile(r"\{\}".join(map(re.escape, re.split(r"<[\w ]+>", sentence))))
        values = re.compile(pattern.pattern.replace(r"\{\}", ".{1,40}?"))
        assert any(values.match(literal) for literal in code), sentence


def test_options_and_files_that_the_troubleshooting_names_exist():
    page = text(DOCS / "troubleshooting.md")
    for config in re.findall(r"`(configs/[\w/]+\.yaml)`", page):
        assert (ROOT / config).is_file(), config
    code = "".join(path.read_text() for path in (ROOT / "sanm_lightning").rglob("*.py"))
    for option in re.findall(r"`?--(?:model|data)\.(?:sanm\.)?(\w+)", page):
        assert re.search(rf"\b{option}\b", code), option

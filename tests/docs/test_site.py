"""The site builds without warnings, and an error of a page fails the build."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")),
    reason="the extra 'docs' is not installed: pip install -e '.[docs]'",
)


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Not --quiet, which hides warnings from --strict.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=quiet, capture_output=True, text=True, check=False)


def test_builds_without_a_warning_and_renders_every_page_and_name(tmp_path):
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for path in (ROOT / "docs").rglob("*.md"):
        page = (tmp_path / "site" / path.relative_to(ROOT / "docs").with_suffix(".html")).read_text()
        assert path.read_text().splitlines()[0].lstrip("# ").split("`")[0] in page
    reference = (tmp_path / "site" / "reference" / "methods.html").read_text()
    assert 'id="sanm_lightning.methods.co_teaching.CoTeaching"' in reference
    assert ":class:`" not in reference
    assert "number of classes." in reference, "arguments have descriptions"


def test_a_dead_link_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[two](two.md) [three](#three)\n")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    lines = (tmp_path / "mkdocs.yml").read_text().partition("\nnav:")[0].replace("hooks: [scripts/docs_hooks.py]\n", "")
    (tmp_path / "mkdocs.yml").write_text(lines + "\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    assert "'two.md', but the target is not found" in built.stderr and "no such anchor" in built.stderr

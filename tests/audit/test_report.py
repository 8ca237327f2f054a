"""What stands in ``report.html``; how it behaves is tested in a browser, see tests/browser."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from sanm_lightning.audit.label_issues import LabelIssues
from sanm_lightning.audit.report import write_report

HARD = ["</script><script>alert(1)</script>", "&amp; \u2028 {{data}}", "=1", "a\nb"]


def table(n=12, **changes) -> LabelIssues:
    given = np.arange(n) % len(HARD)
    content = {
        "paths": [f"train/{HARD[g]}/{i} %#?.png" for i, g in enumerate(given)],
        "splits": ["train", "test"] * (n // 2),
        "given": given,
        "suggested": (given + 1) % len(HARD),
        "quality": np.linspace(1, 0, n),
        "p_given": np.linspace(1, 0, n),
        "p_suggested": np.linspace(0, 1, n),
        "class_names": HARD,
    }
    return LabelIssues(**{**content, **changes})


def gray(row: int) -> np.ndarray:
    return np.full((40, 200, 3), 20 * row, np.uint8)


def data_of(page) -> dict:
    text = page.read_text()
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


class TestData:
    def test_names_cannot_leave_the_data(self, tmp_path):
        summary = {"title": HARD[0], "notes": [HARD[1]]}
        page = write_report(tmp_path, table(unreadable={0: HARD[0]}), summary, gray)
        text = page.read_text()
        assert "alert(1)</script>" not in text
        assert "\u2028" not in text
        data = data_of(page)
        assert data["classes"] == HARD
        assert data["summary"] == summary
        assert data["rows"]["unreadable"] == {"11": HARD[0]}

    def test_rows_are_worst_first(self, tmp_path):
        rows = data_of(write_report(tmp_path, table(), {}, gray))["rows"]
        assert rows["name"] == table().paths[::-1]
        assert rows["quality"] == sorted(rows["quality"])
        assert rows["quality"][-1] == 10**6

    def test_numbers_of_numpy_and_those_that_are_not_finite(self, tmp_path):
        summary = {"estimated_noise_rate": np.float32(0.5), "interval": (np.nan, 1), "classes": np.arange(2)}
        found = data_of(write_report(tmp_path, table(), summary, None))["summary"]
        assert found == {"estimated_noise_rate": 0.5, "interval": [None, 1], "classes": [0, 1]}

    def test_the_identity_is_that_of_the_labels(self, tmp_path):
        def identity(issues):
            return data_of(write_report(tmp_path, issues, {}, None))["id"]

        first = identity(table())
        assert identity(table(quality=np.linspace(0, 1, 12))) == first
        assert identity(table(given=np.zeros(12, int))) != first

    def test_the_matrix_of_few_classes(self, tmp_path):
        matrix = np.eye(4) * 0.9 + 0.025
        assert np.allclose(data_of(write_report(tmp_path, table(), {}, None, transition=matrix))["transition"], matrix)
        many = table(class_names=[*HARD, *map(str, range(100, 150))])
        assert data_of(write_report(tmp_path, many, {}, None, transition=np.eye(54)))["transition"] is None


class TestPage:
    def test_needs_no_network_and_runs_its_own_script_only(self, tmp_path):
        text = write_report(tmp_path, table(), {}, gray).read_text()
        assert not re.search(r"""(src|href)=["'](http|//)|@import|url\(""", text)
        script = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
        assert len(script) == 1
        digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in text
        assert "innerHTML" not in text


class TestImages:
    def test_the_worst_are_embedded_small(self, tmp_path):
        asked = []

        def images(row):
            asked.append(row)
            return gray(row)

        data = data_of(write_report(tmp_path, table(), {}, images, root=tmp_path, embed=3))
        assert asked == [11, 10, 9]
        assert len(data["embedded"]) == 3
        content = base64.b64decode(data["embedded"][1].removeprefix("data:image/jpeg;base64,"))
        image = np.asarray(Image.open(io.BytesIO(content)))
        assert image.shape == (19, 96, 3)
        assert abs(int(image.mean()) - 200) < 3
        assert not (tmp_path / "thumbs").exists()

    def test_small_and_gray_images_and_those_that_have_gone(self, tmp_path):
        def images(row):
            if row == 11:
                raise FileNotFoundError("gone")
            return np.zeros((8, 8), np.uint8)

        embedded = data_of(write_report(tmp_path, table(), {}, images, root=tmp_path))["embedded"]
        assert embedded[0] is None
        assert Image.open(io.BytesIO(base64.b64decode(embedded[1].split(",")[1]))).size == (8, 8)

    def test_unreadable_rows_are_not_asked_for(self, tmp_path):
        asked = []
        write_report(tmp_path, table(unreadable={3: "x"}), {}, lambda row: asked.append(row) or gray(row))
        assert sorted(asked) == [row for row in range(12) if row != 3]

    def test_files_are_found_from_the_page_and_from_anywhere(self, tmp_path):
        (tmp_path / "a #1").mkdir()
        bases = data_of(write_report(tmp_path / "runs/1", table(), {}, None, root=tmp_path / "a #1"))["bases"]
        assert bases == ["./../../a%20%231/", (tmp_path / "a #1").resolve().as_uri() + "/"]

    @pytest.mark.parametrize("paths", [True, False])
    def test_thumbs_where_there_are_no_files(self, tmp_path, paths):
        issues = table() if paths else table(paths=None, index=np.arange(100, 112))
        data = data_of(write_report(tmp_path, issues, {}, gray, embed=10))
        assert data["thumbs"]
        assert sorted(path.name for path in (tmp_path / "thumbs").iterdir()) == ["11.jpg", "12.jpg"]
        assert np.asarray(Image.open(tmp_path / "thumbs/12.jpg")).mean() < 3

    def test_no_images(self, tmp_path):
        data = data_of(write_report(tmp_path, table(), {}, None))
        assert (data["embedded"], data["thumbs"]) == ([], False)

    def test_bad_sizes(self, tmp_path):
        with pytest.raises(ValueError, match="embed >= 0"):
            write_report(tmp_path, table(), {}, gray, embed=-1)

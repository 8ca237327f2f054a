"""``report.html`` in a real browser, from a file, without a server. ``make browser`` runs these tests and shows the times."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanm_lightning.audit.label_issues import LabelIssues, read_label_issues, write_label_issues
from sanm_lightning.audit.relabel import relabel
from sanm_lightning.audit.report import write_report
from sanm_lightning.audit.verdicts import read_accepted
from tests.browser.chromium import Chromium, find

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium: install one, such as Debian's package chromium")

CLASSES = ["cat", "<script>alert(1)</script>", 'say "dog", or\nfox', "=1+1", "a|b & é"]
N, EMBED = 300, 20


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Chromium(find(), tmp_path_factory.mktemp("downloads"))
    yield chromium
    chromium.close()


def folder_name(label: int) -> str:
    return CLASSES[label].replace("/", "_")


@pytest.fixture(scope="module")
def audit(tmp_path_factory) -> Path:
    """An audit of files with hard names; sample i has quality i / N, and label i modulo the number of classes."""
    root, folder = tmp_path_factory.mktemp("images #1 %20"), tmp_path_factory.mktemp("audit")
    draw = np.random.default_rng(0)
    given = np.arange(N) % len(CLASSES)
    splits = ["train" if i % 3 else "test" for i in range(N)]
    paths = [
        f"{split}/{folder_name(label)}/{i} ?#%.png" for i, (split, label) in enumerate(zip(splits, given, strict=True))
    ]
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(root / path)
    quality = np.arange(N) / N
    suggested = np.where(quality < 0.5, (given + 1) % len(CLASSES), given)
    issues = LabelIssues(
        paths, splits, given, suggested, quality, quality, 1 - quality, CLASSES, draw.integers(0, len(CLASSES), (N, 5)),
        unreadable={N - 1: "cut off <b>here</b>"},
    )  # fmt: skip
    write_label_issues(folder / "label_issues.csv", issues)
    summary = {
        "title": "<b>hard</b> names", "estimated_noise_rate": 0.25, "interval": [0.2, 0.3], "worst_pair": CLASSES[1:3],
        "classes": [{"name": name, "count": 60, "wrong": 0.2, "confused_with": CLASSES[0]} for name in CLASSES],
        "classes_of": "train",
        "findings": [{"title": "Duplicates", "items": [paths[7:9], paths[100:102]]}],
    }  # fmt: skip
    write_report(
        folder, issues, summary, lambda i: np.asarray(Image.open(root / paths[i])), root=root, embed=EMBED,
        transition=np.full((5, 5), 0.2),
    )  # fmt: skip
    return folder


@pytest.fixture
def page(browser, audit):
    """The page as it is at first; at the end nothing may have been complained about."""
    browser.errors.clear()
    browser.media("light")
    browser.resize(1366, 860)
    browser.open(audit / "report.html")
    browser.run("localStorage.clear()")
    browser.reload()
    yield browser
    assert browser.errors == []


def names(page) -> list[str]:
    """Paths of the rows in view, in the table."""
    show(page, "table")
    return page.run("[...document.querySelectorAll('.item .path')].map((e) => e.textContent)")


def show(page, view: str) -> None:
    page.run(f"document.getElementById('as-{view}').click()")


def choose(page, control: str, label: str) -> None:
    page.run(
        f"(() => {{ const s = document.getElementById('{control}');"
        f" s.value = [...s.options].find((o) => o.textContent === {json.dumps(label)}).value;"
        " s.dispatchEvent(new Event('change')); })()"
    )


def search(page, text: str) -> None:
    page.run(f"(() => {{ const s = document.getElementById('search'); s.value = {json.dumps(text)}; s.oninput(); }})()")


def status(page) -> str:
    return page.run("document.getElementById('status').textContent")


def current(page) -> str:
    """Path of the selected sample."""
    return page.run("document.querySelector('#detail dd').textContent")


def issues_of(audit: Path) -> LabelIssues:
    return read_label_issues(audit / "label_issues.csv", CLASSES)


def export(page, tmp_path: Path) -> Path:
    """Click on the button, and return the file that came."""
    page.set_downloads(tmp_path)
    page.click("#export")
    path = tmp_path / "accepted.csv"
    page.wait_for_file(path)
    return path


class TestImages:
    def test_embedded_ones_and_those_in_files_load(self, page):
        for view in ("sheet", "table"):
            show(page, view)
            for key in ("Home", *["PageDown"] * 6):
                page.press(key)
                page.wait(
                    "[...document.querySelectorAll('.item')].filter((e) => e.querySelector('img')"
                    " && !e.querySelector('img').naturalWidth).length === 0"
                )
        sources = page.run(
            "[...document.querySelectorAll('.item img')].map((e) => [e.src.slice(0, 5), e.naturalWidth])"
        )
        assert {tuple(source) for source in sources} == {("file:", 64)}
        page.press("Home")
        page.wait("document.querySelector('.item img').naturalWidth === 64")
        assert page.run("document.querySelector('.item img').src").startswith("data:image/jpeg;base64,")

    def test_thumbs_of_sets_without_files(self, browser, audit, tmp_path):
        issues = issues_of(audit)
        issues = dataclasses.replace(issues, paths=None, index=np.arange(N), unreadable={}, suggested=issues.given,
                                     quality=np.arange(N) / N, p_given=np.zeros(N), p_suggested=np.ones(N))  # fmt: skip
        write_report(tmp_path, issues, {}, lambda i: np.full((20, 30, 3), 99, np.uint8), embed=3)
        browser.errors.clear()
        browser.open(tmp_path / "report.html")
        browser.press("End")
        browser.wait("document.querySelectorAll('.item img').length > 5")
        browser.wait("[...document.querySelectorAll('.item img')].every((e) => e.naturalWidth === 30)")
        assert "/thumbs/300.jpg" in browser.run("[...document.querySelectorAll('.item img')].pop().src")
        assert browser.errors == []

    def test_unreadable_files_and_their_reason_are_said(self, page):
        page.press("End")
        assert "cut off <b>here</b>" in page.run("document.getElementById('detail').textContent")
        assert page.run("document.querySelectorAll('b').length") == 0


class TestWords:
    def test_hard_names_are_shown_as_they_are(self, page, audit):
        show(page, "table")
        given = page.run("[...document.querySelectorAll('.item .given')].slice(0, 5).map((e) => e.textContent)")
        assert given == CLASSES
        assert page.run("document.querySelector('h1').textContent") == "Label audit: <b>hard</b> names"
        assert page.run("document.querySelector('#summary h2').textContent") == "Classes of train"
        line = page.run("document.getElementById('verdict').textContent")
        assert (
            line
            == f"About 25.0 % (20.0 % to 30.0 %) of the labels are wrong · 300 images · most often {CLASSES[1]} → {CLASSES[2]}"
        )
        options = page.run("[...document.getElementById('given').options].map((o) => o.value + o.textContent)")
        assert options == ["any", *(f"{i}{name}" for i, name in enumerate(CLASSES))]
        assert names(page)[:5] == issues_of(audit).paths[:5]

    def test_everything_has_a_name_for_readers(self, page):
        nameless = page.run(
            "[...document.querySelectorAll('button, input, select')].filter((e) =>"
            " !(e.textContent || e.getAttribute('aria-label') || e.closest('label'))).length"
        )
        assert nameless == 0
        page.run("document.getElementById('list').focus()")
        page.press("j")
        row = page.run(
            "document.getElementById(document.getElementById('list').getAttribute('aria-activedescendant')).ariaLabel"
        )
        assert "given <script>" in row
        assert page.run("document.getElementById('list').getAttribute('aria-rowcount')") == "301"

    def test_a_click_in_a_list_of_findings_shows_the_sample(self, page, audit):
        page.run("document.querySelectorAll('#summary details')[0].querySelectorAll('button')[2].click()")
        assert current(page) == issues_of(audit).paths[100]


class TestFilterAndSort:
    def test_text(self, page):
        search(page, "25 ?#")
        assert all("25 ?#" in name for name in names(page))
        assert status(page).startswith("3 of 300 shown")
        search(page, "ALERT")
        assert status(page).startswith("90 of 300 shown")  # given 60, and suggested for 30 more
        search(page, "no such thing")
        assert status(page).startswith("0 of 300 shown")
        assert "change the filter" in page.run("document.getElementById('detail').textContent")
        page.press("j", "w")  # nothing to act on

    def test_pair_split_and_verdicts(self, page):
        choose(page, "given", CLASSES[1])
        choose(page, "suggested", CLASSES[2])
        assert status(page).startswith("30 of 300 shown")
        choose(page, "split", "test")
        assert status(page).startswith("10 of 300 shown")
        page.run("document.getElementById('list').focus()")
        page.press("w", "r")
        choose(page, "show", "wrong")
        assert status(page).startswith("1 of 300 shown")
        choose(page, "show", "no verdict")
        assert status(page).startswith("8 of 300 shown")
        choose(page, "given", "any")
        choose(page, "suggested", "any")
        choose(page, "split", "all")
        choose(page, "show", "suggested differs")
        assert status(page).startswith("150 of 300 shown")

    def test_pairs_of_the_summary(self, page):
        page.run("document.querySelector('#summary ol button').click()")
        assert status(page).startswith("30 of 300 shown")

    def test_headers_sort_both_ways(self, page, audit):
        show(page, "table")
        paths = issues_of(audit).paths
        page.click("#head [data-sort='quality']")
        page.click("#head [data-sort='quality']")
        assert names(page)[:3] == [paths[N - 2], paths[N - 3], paths[N - 4]]
        assert page.run("document.querySelector('#head [aria-sort=descending]').textContent") == "quality ▼"
        page.click("#head [data-sort='path']")
        assert names(page)[0].startswith("test/")
        page.click("#head [data-sort='rank']")
        assert names(page)[:2] == paths[:2]
        page.press("End")
        choose(page, "sort", "rank ▼")
        assert names(page)[0] == paths[N - 1]


class TestVerdicts:
    def test_keys_judge_move_and_undo(self, page, audit):
        paths = issues_of(audit).paths
        page.press("w", "r", "d", "a")
        assert "4 verdicts (1 wrong, 1 right, 1 drop, 1 ambiguous)" in status(page)
        assert current(page) == paths[4]
        page.press("u")
        assert "3 verdicts" in status(page)
        assert current(page) == paths[3]
        page.press("k", "c", "j", "ArrowRight", "ArrowLeft", "ArrowDown")
        assert "2 verdicts" in status(page)
        page.press("u", "u", "u", "u", "u")
        assert "0 verdicts" in status(page)

    def test_buttons_give_and_remove_a_verdict(self, page):
        page.click("#row-1 .tick.drop")
        assert page.run("document.querySelector('#row-1 .tick.drop').ariaPressed") == "true"
        assert "1 verdict (1 drop)" in status(page)
        page.click("#row-1 .tick.drop")
        assert "0 verdicts" in status(page)

    def test_another_label_and_a_new_class(self, page, tmp_path):
        page.press("n")
        assert page.run("document.activeElement.id") == "new-label"
        choose(page, "new-label", CLASSES[3])
        assert "1 wrong" in status(page)
        assert page.run("document.activeElement.id") == "list"
        page.press("j")
        choose(page, "new-label", "a new class …")
        page.run("document.getElementById('new-class').focus()")
        page.press(*"bird", "Enter")
        page.press("Escape")
        assert page.run("document.activeElement.id") == "list"
        assert read_accepted(export(page, tmp_path)).new_labels == [CLASSES[3], "bird"]

    def test_wrong_without_a_suggestion_asks_for_a_label(self, page):
        search(page, "201 ?#")
        page.run("document.getElementById('list').focus()")
        page.press("w")
        assert "choose the right one" in status(page)
        assert "0 verdicts" in status(page)
        assert page.run("document.activeElement.id") == "new-label"

    def test_keys_in_the_search_are_letters(self, page):
        page.press("/")
        page.press(*"wrd")
        assert page.run("document.getElementById('search').value") == "wrd"
        assert "0 verdicts" in status(page)

    def test_a_reload_keeps_them(self, page):
        page.press("w", "r", "d", "a", "u")
        page.reload()
        assert "3 verdicts (1 wrong, 1 right, 1 drop)" in status(page)
        assert page.run("document.querySelector('#row-0 .tick.wrong').ariaPressed") == "true"


class TestAcceptedFile:
    def test_comes_out_and_is_applied(self, page, audit, tmp_path):
        page.press("w", "r", "d", "a", "w")
        path = export(page, tmp_path)
        issues = issues_of(audit)
        accepted = read_accepted(path)
        assert accepted.names == issues.paths[:5]
        assert accepted.given == CLASSES
        assert accepted.verdicts == ["wrong", "right", "drop", "ambiguous", "wrong"]
        assert accepted.new_labels == [CLASSES[1], "", "", "", CLASSES[0]]
        result = relabel(audit, path, out=tmp_path / "new" / "labels.csv")
        assert result[1:] == (N, 2, 1)

    def test_goes_back_in(self, page, tmp_path):
        page.press("w", "r", "d", "a")
        path = export(page, tmp_path)
        before = path.read_bytes()
        page.run("localStorage.clear()")
        page.reload()
        page.choose_file("#file", path)
        page.wait("document.getElementById('status').textContent.includes('4 verdicts read.')")
        path.unlink()
        assert export(page, tmp_path).read_bytes() == before
        page.click("#undo")
        assert "0 verdicts" in status(page)

    def test_of_another_data_set_is_told(self, page, tmp_path):
        path = tmp_path / "other.csv"
        path.write_text("path,split,given_label,verdict,new_label\nx.png,train,cat,right,\n")
        page.choose_file("#file", path)
        page.wait("document.getElementById('status').textContent.includes('1 rows are of another data set')")
        path.write_text("a,b\n1,2\n")
        page.choose_file("#file", path)
        page.wait("document.getElementById('status').textContent.includes('Nothing read')")


class TestManyRows:
    def test_fifty_thousand_open_scroll_filter_and_verdict(self, browser, tmp_path, capsys):
        n = 50_000
        draw = np.random.default_rng(0)
        given, classes = draw.integers(0, 100, n), [f"class {i}" for i in range(100)]
        issues = LabelIssues(
            [f"train/{classes[label]}/image_{i:08d}.jpg" for i, label in enumerate(given)], ["train"] * n, given,
            draw.integers(0, 100, n), np.linspace(0, 1, n), draw.random(n), draw.random(n), classes,
            draw.integers(0, 100, (n, 10)),
        )  # fmt: skip
        noise = draw.integers(0, 255, (96, 96, 3), dtype=np.uint8)
        write_report(tmp_path, issues, {}, lambda i: noise, root=tmp_path)
        browser.errors.clear()
        browser.resize(1366, 860)
        browser.open(tmp_path / "report.html")
        browser.wait(
            "performance.getEntriesByName('report-ready').length && performance.getEntriesByType('paint').length"
        )
        paint = browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        ready = browser.run("performance.getEntriesByName('report-ready')[0].startTime")
        size = (tmp_path / "report.html").stat().st_size / 2**20
        with capsys.disabled():
            print(f"\n50,000 rows ({size:.1f} MiB): first paint {paint:.0f} ms, rows shown {ready:.0f} ms", end=" ")
        for view in ("sheet", "table"):
            show(browser, view)
            browser.run("document.getElementById('list').scrollTop = 1e9")
            browser.wait("document.getElementById('row-49999') !== null")
            assert browser.run("document.querySelectorAll('.item').length") < 200
            low = browser.run(
                "document.getElementById('list').getBoundingClientRect().bottom"
                " - document.getElementById('row-49999').getBoundingClientRect().bottom"
            )
            assert low > -1  # the last row is in full view
        browser.run("document.getElementById('list').focus()")
        browser.press("Home", "d", "End", "r")
        assert "2 verdicts (1 right, 1 drop)" in status(browser)
        search(browser, "00049999")
        assert status(browser).startswith("1 of 50,000 shown")
        assert browser.errors  # the files are not there, which shows that complaints arrive here
        complaints = [error for error in browser.errors if "ERR_FILE_NOT_FOUND" not in error]
        assert complaints == []


class TestLooks:
    def test_narrow_dark_and_on_paper(self, page, tmp_path):
        page.resize(400, 800)
        assert page.run("document.documentElement.scrollWidth") <= 400
        page.media("dark")
        assert page.run("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        page.media("dark", "print")
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.run("getComputedStyle(document.getElementById('bar')).display") == "none"
        page.media("light")
        page.pdf(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 10_000

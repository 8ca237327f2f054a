"""Write the rows of a study as Markdown, CSV or LaTeX."""

import csv
import io
from collections.abc import Callable, Sequence

from sanm_lightning.study.table import Row

__all__ = ["FORMATS", "csv_table", "latex_table", "markdown_table"]

HEADER = ("method", "SANM", "data", "noise", "seeds", "best", "published", "difference", "last", "published", "difference",
          "epochs", "hours")  # fmt: skip
BEST, PUBLISHED = 5, (6, 7, 9, 10)
"""Column of the best accuracy; columns that are left out without published values."""
SECONDS = ("seconds_to_accuracy", "seconds", "machines")
"""Names of the columns of CSV for the seconds until an accuracy."""
TEX = {"±": r"$\pm$", "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{",
       "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}  # fmt: skip


def markdown_table(rows: Sequence[Row], source: str | None, accuracy: float | None = None) -> str:
    """Return a Markdown table with footnotes.

    Args:
        rows: rows of the study.
        source: source of the published values; None if there are none.
        accuracy: accuracy in percent for a column of the seconds until it; None without that column.
    """
    marks, shown, header = _marks(rows), _columns(rows, accuracy), _header(accuracy)
    lines = [f"| {' | '.join(header[column] for column in shown)} |", f"|{'---|' * len(shown)}"]
    for row in rows:
        fields = [field.replace("|", "\\|") for field in [*_fields(row), *_seconds(row, rows, accuracy)]]
        if row.reasons:
            fields[BEST] += f" <sup>{marks[row.reasons]}</sup>"
        lines.append(f"| {' | '.join(fields[column] for column in shown)} |")
    notes = [f"<sup>{mark}</sup> not comparable: {', '.join(why)}" for why, mark in marks.items()]
    return "\n".join([*lines, "", *_paragraphs([_caption(rows, source, accuracy), *notes])])


def latex_table(rows: Sequence[Row], source: str | None, accuracy: float | None = None) -> str:
    """Return a LaTeX table (package booktabs) with footnotes below.

    Args:
        rows: rows of the study.
        source: source of the published values; None if there are none.
        accuracy: accuracy in percent for a column of the seconds until it; None without that column.
    """
    marks, shown, header = _marks(rows), _columns(rows, accuracy), _header(accuracy)
    heads = " & ".join(_tex(header[column]) for column in shown)
    lines = [rf"\begin{{tabular}}{{llll{'r' * (len(shown) - 4)}}}", r"\toprule", heads + r" \\", r"\midrule"]
    for row in rows:
        fields = [_tex(field) for field in [*_fields(row), *_seconds(row, rows, accuracy)]]
        if row.reasons:
            fields[BEST] += rf"\textsuperscript{{{marks[row.reasons]}}}"
        lines.append(" & ".join(fields[column] for column in shown) + r" \\")
    notes = [rf"\textsuperscript{{{mark}}}" + _tex(f" not comparable: {', '.join(why)}") for why, mark in marks.items()]
    paragraphs = _paragraphs([_tex(_caption(rows, source, accuracy)), *notes])
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", "", *paragraphs])


def csv_table(rows: Sequence[Row], source: str | None, accuracy: float | None = None) -> str:
    """Return CSV with one row per row of the study, full precision, and the reasons in a column.

    Args:
        rows: rows of the study.
        source: source of the published values, which is repeated in each row that has one.
        accuracy: accuracy in percent for columns of the seconds until it; None without these columns.
    """
    file = io.StringIO()
    kinds = [f"{kind}_{name}" for kind in ("best", "last") for name in ("mean", "spread", "published", "difference")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["method", "sanm", "data", "noise", "variant", "seeds_finished", "seeds", "split", *kinds, "published_spread", "source",
         "epochs", "hours", "missing", "not_comparable", *([] if accuracy is None else SECONDS)]
    )  # fmt: skip
    for row in rows:
        values = [
            value
            for kind in ("best", "last")
            for value in (row.mean(kind), row.spread(kind), row.published.get(kind), row.difference(kind))
        ]
        numbers = ["" if value is None else f"{value:.6g}" for value in values]
        writer.writerow(
            [row.method, row.sanm, row.data, row.noise, row.variant, len(row.best), row.seeds, row.split, *numbers,
             row.published.get("spread", ""), source if row.published else "", row.epochs, f"{row.hours:.4f}", row.missing,
             "; ".join(row.reasons), *_csv_seconds(row, accuracy)]
        )  # fmt: skip
    return file.getvalue()


FORMATS: dict[str, Callable[..., str]] = {
    "markdown": markdown_table,
    "csv": csv_table,
    "latex": latex_table,
}
"""Functions by the name of their format."""


def _header(accuracy: float | None) -> tuple[str, ...]:
    return HEADER if accuracy is None else (*HEADER, f"seconds to {accuracy:g} %")


def _columns(rows: Sequence[Row], accuracy: float | None) -> list[int]:
    """Return the columns to be shown."""
    known = any(row.published for row in rows)
    return [column for column in range(len(_header(accuracy))) if known or column not in PUBLISHED]


def _machines(rows: Sequence[Row]) -> list[str]:
    """Return the machines on which the rows were trained."""
    return list(dict.fromkeys(machine for row in rows if row.curve for machine in row.curve.machines))


def _seconds(row: Row, rows: Sequence[Row], accuracy: float | None) -> list[str]:
    """Return the seconds of a row until an accuracy as one field, with the numbers of its machines if there are several."""
    if accuracy is None:
        return []
    if row.curve is None:
        return ["not recorded" if row.best else ""]
    machines, seconds = _machines(rows), row.curve.seconds_to(accuracy)
    where = ", ".join(str(machines.index(machine) + 1) for machine in row.curve.machines)
    text = "not reached" if seconds is None else f"{seconds:.1f}"
    return [text if len(machines) == 1 else f"{text} (machine {where})"]


def _csv_seconds(row: Row, accuracy: float | None) -> list[str]:
    """Return the fields of :data:`SECONDS`: accuracy in percent, seconds (empty if it is not reached), machines."""
    if accuracy is None:
        return []
    seconds = row.curve and row.curve.seconds_to(accuracy)
    return [
        f"{accuracy:g}",
        "" if seconds is None else f"{seconds:.6g}",
        "; ".join(row.curve.machines if row.curve else ()),
    ]


def _fields(row: Row) -> list[str]:
    """Return the fields of a row as text; what is not finished is in the column of the best accuracy, or of the seeds."""
    seeds = f"{len(row.best)} of {row.seeds}" if row.best and row.missing else str(row.seeds)
    fields = [row.method, f"{row.sanm} {row.variant}".strip(), row.data, row.noise, seeds]
    for kind in ("best", "last"):
        mean, spread = row.mean(kind), row.spread(kind)
        text = "" if mean is None else f"{mean:.2f}" + ("" if spread is None else f" ± {spread:.2f}")
        if text and row.split == "val":
            text += " on val"
        if kind == "best" and row.missing:
            text = f"{text} ({row.missing})" if text else row.missing
        published, difference = row.published.get(kind), row.difference(kind)
        known = "" if published is None else f"{published:g}"
        if kind == "best" and "spread" in row.published:
            known += f" ± {row.published['spread']:g}"
        fields += [text, known, "" if difference is None else f"{difference:+.2f}"]
    return [*fields, row.epochs, f"{row.hours:.2f}" if row.hours else ""]


def _marks(rows: Sequence[Row]) -> dict[tuple[str, ...], str]:
    """Return the letters of the footnotes by their reasons: a to z, then aa, ab, ..."""
    reasons = dict.fromkeys(row.reasons for row in rows if row.reasons)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {
        why: (letters[number // 26 - 1] if number >= 26 else "") + letters[number % 26]
        for number, why in enumerate(reasons)
    }


def _caption(rows: Sequence[Row], source: str | None, accuracy: float | None) -> str:
    published = "" if source is None else f" Published: {source}."
    seconds = "" if accuracy is None else _seconds_caption(_machines(rows), accuracy)
    return (
        "Test accuracy in %: mean ± standard deviation over seeds; best: the highest of all evaluations, selected on the test "
        f"set; hours: all seeds together.{seconds}{published}"
    )


def _seconds_caption(machines: Sequence[str], accuracy: float) -> str:
    if not machines:
        return ""
    named = [f"{number}: {machine}" if len(machines) > 1 else machine for number, machine in enumerate(machines, 1)]
    return (
        f" Seconds to {accuracy:g} %: training on {'; '.join(named)}, with pre-training and without evaluations, until the "
        "first evaluation with this mean accuracy over seeds; not comparable between machines."
    )


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in (text, "")]


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)

"""Write the tables of measured numbers in README.md, docs/ and results/README.md from the files in results/.

    python scripts/tables.py            # or: make tables

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``, with NAME from :data:`TABLES`. Text outside of the marks
is not changed. Numbers are edited in results/ only; tests/docs/test_tables.py fails if a page differs.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import audit_cifar10  # noqa: E402  (examples/ is no package)
import cifar10_small  # noqa: E402
import clean_or_train  # noqa: E402
import digits_methods  # noqa: E402

from benchmarks import forward_passes  # noqa: E402
from sanm_lightning import methods  # noqa: E402
from sanm_lightning.study.formats import markdown_table  # noqa: E402
from sanm_lightning.study.record import SavedRecord  # noqa: E402
from sanm_lightning.study.table import rows_of  # noqa: E402

MARKED = re.compile(r"(?<=<!-- table: )(?P<name>[\w-]+) -->\n(?P<table>.*?)\n*(?=<!-- end -->)", re.DOTALL)
DIGITS_METHODS = ("CrossEntropy", "CoTeaching", "CDR", "ELR", "ELRPlus", "DivideMix", "C2D", "SSR", "GCE")
Runs = list[dict[str, Any]]


def load(name: str) -> Any:
    """Return the content of ``results/<name>.json``."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def decimals(value: float) -> str:
    """Format a number in [0, 1] with three decimals, halves rounded up, without the leading zero."""
    exact = Decimal(repr(round(value, 6)))  # without the error of a sum of binary fractions
    return str(exact.quantize(Decimal("0.001"), ROUND_HALF_UP)).removeprefix("0")


def markdown(header: str, rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def mean(runs: Runs, key: str) -> str:
    """Format the mean of a quantity over runs; empty if no run has it."""
    values = [run[key] for run in runs if run[key] is not None]
    return decimals(statistics.mean(values)) if values else ""


def each(runs: Runs, key: str = "test_accuracy_last") -> str:
    """Format the mean of a quantity over seeds, and the value of each seed."""
    return f"{mean(runs, key)} ({' '.join(decimals(run[key]) for run in runs)})"


def which_method() -> str:
    """Return the table of the README: methods alone and with SANM on the small CIFAR-10."""
    runs = {row["name"]: row["runs"] for row in load("cifar10_small")["results"]}
    rows = (
        ("cross-entropy", "cross_entropy", "ce", "sanm"),
        ("Co-teaching", "co_teaching", "ct", "ct_sanm"),
        ("CDR", "cdr", "cdr", "cdr_sanm"),
        ("ELR", "elr", "elr", "elr_sanm"),
        ("SSR", "ssr", "ssr60", "ssr60_sanm"),
    )
    last = "test_accuracy_last"
    return markdown(
        "| method | `configs/method/` | alone | with SANM | seeds |",
        (
            (name, f"`{config}`", mean(runs[alone], last), mean(runs[sanm], last), str(len(runs[alone])))
            for name, config, alone, sanm in rows
        ),
    )


def small_cifar10() -> str:
    """Return the table of all runs on the small CIFAR-10, with the options of each row."""
    found = {row["name"]: row for row in load("cifar10_small")["results"]}
    names = {  # and whether the options are those of the row before, with configs/sanm.yaml
        "ce": ("cross-entropy", False),
        "sanm": ("SANM", False),
        "oracle": ("SANM, oracle quality", False),
        "elr": ("ELR", False),
        "elr_sanm": ("SANM(ELR)", False),
        "elr_amg": ("SANM(ELR), masks only", False),
        "elr_oracle": ("SANM(ELR), oracle quality", False),
        "elr_plus": ("ELR+", False),
        "elr_plus_sanm": ("SANM(ELR+)", True),
        "cdr": ("CDR", False),
        "cdr_sanm": ("SANM(CDR)", True),
        "ct": ("Co-teaching", False),
        "ct_sanm": ("SANM(Co-teaching)", True),
        "ct_slow": ("Co-teaching, 20 epochs to the final rate", False),
        "ssr30": ("SSR, 30 epochs", False),
        "ssr30_sanm": ("SANM(SSR), 30 epochs", True),
        "ssr30_share": ("SANM(SSR), quality: fraction of votes, 30 epochs", False),
        "ssr30_share_amg": ("SANM(SSR), quality: fraction of votes, masks only, 30 epochs", False),
        "ssr30_oracle": ("SANM(SSR), oracle quality, 30 epochs", False),
        "ssr60": ("SSR", False),
        "ssr60_sanm": ("SANM(SSR)", True),
    }
    rows = []
    for name, (told, same) in names.items():
        words, runs = found[name]["words"], found[name]["runs"]
        options = "the same, with `--config configs/sanm.yaml`" if same else f"`{words}`" if words else ""
        last = each(runs) if len(runs) > 1 else mean(runs, "test_accuracy_last")
        seeds = " ".join(str(run["seed"]) for run in runs)
        rows.append((told, options, seeds, mean(runs, "test_accuracy_best"), last, mean(runs, "quality_auc")))
    return markdown("| | options | seeds | best | last | quality AUC |", rows)


def quickstart() -> str:
    """Return the table of the quickstart on digits, one column for each seed."""
    found = load("digits")
    tuned, default = found["quickstart"]["results"], found["sanm_defaults"]["results"]
    rows = (
        ("cross-entropy", [run for run in tuned if not run["sanm"]]),
        ("SANM, `configs/quickstart_sanm.yaml`", [run for run in tuned if run["sanm"]]),
        ("SANM, `configs/sanm.yaml`", default),
    )
    seeds = sorted({run["seed"] for run in tuned})
    cells = []
    for name, runs in rows:
        last = {run["seed"]: decimals(run["test_accuracy_last"]) for run in runs}
        aucs = [run["quality_auc"] for run in runs if run["quality_auc"] is not None]
        span = f"{decimals(min(aucs))} to {decimals(max(aucs))}" if aucs else ""
        cells.append((name, *(last.get(seed, "") for seed in seeds), span))
    return markdown(f"| | {' | '.join(map(str, seeds))} | quality AUC |", cells)


def digits_runs(name: str) -> dict[tuple[float, str, bool], Runs]:
    """Return the runs of a study on digits by noise rate, method, and whether SANM is on."""
    return {(row["noise_rate"], row["method"], row["sanm"]): row["runs"] for row in load(name)["results"]}


def digits_all_methods() -> str:
    """Return the table of all methods on digits."""
    found, best = digits_runs("digits_methods"), "test_accuracy_best"
    return markdown(
        "| wrong labels | method | best alone | last alone | best, SANM | last, SANM | quality AUC |",
        (
            (
                f"{rate:.0%}".replace("%", " %"), f"`{method}`", mean(found[rate, method, False], best),
                each(found[rate, method, False]), mean(found[rate, method, True], best),
                each(found[rate, method, True]), mean(found[rate, method, True], "quality_auc"),
            )
            for rate in (0.5, 0.8) for method in DIGITS_METHODS if (rate, method, True) in found
        ),
    )  # fmt: skip


def digits_methods_frame() -> str:
    """Return the table of all methods on digits, measured with two versions."""
    before, now = digits_runs("digits_methods"), digits_runs("digits_methods_frame")

    def cell(found: dict[tuple[float, str, bool], Runs], *row: Any) -> str:
        return each(found[row]) if row in found else "not run"

    return markdown(
        "| wrong labels | method | last alone, before | last alone, now | last, SANM, before | last, SANM, now |",
        (
            (
                f"{rate:.0%}".replace("%", " %"), f"`{method}`",
                *(cell(found, rate, method, sanm) for sanm in (False, True) for found in (before, now)),
            )
            for rate in (0.5, 0.8) for method in DIGITS_METHODS
        ),
    )  # fmt: skip


def digits_soft_targets() -> str:
    """Return the table of regularized soft targets on digits."""
    rows = []
    for method, kinds in load("digits_soft_targets")["runs"].items():
        for kind, name in (("alone", "alone"), ("sanm", "SANM, Eq. 7"), ("smoothing", "SANM, `spread: smoothing`")):
            runs = [kinds[kind][seed] for seed in sorted(kinds[kind])]
            each = " ".join(decimals(run["test_accuracy_last"]) for run in runs)
            rows.append((f"`{method}`", name, f"{mean(runs, 'test_accuracy_last')} ({each})"))
    return markdown("| method | | last, seeds 1 to 3 |", rows)


def loaders() -> str:
    """Return the table of loaders, ratios of images per second to those of the data module."""
    names = {
        "sanm_lightning": "data module",
        "torchvision": "torchvision",
        "albumentationsx": "AlbumentationsX",
        "kornia": "kornia",
    }
    found = load("loaders")["loaders"]
    own = found["sanm_lightning"]["images_per_s"]
    rows = (
        (title, f"{(rate := found[name]['images_per_s']):.0f}", f"{rate / own:.2f}") for name, title in names.items()
    )
    return markdown("| loader | images per second | ratio |", rows)


def audit_image_size() -> str:
    """Return the table of audits by the size of the images, ratios of seconds to the smallest size."""
    runs = load("audit_image_size")["runs"]["worst"]
    sizes = sorted(runs, key=int)
    first = runs[sizes[0]]["feature_seconds"]
    keys = ("auroc", "precision_at_100", "precision_at_300", "estimated", "wrong")
    rows = (
        [size, *(decimals(runs[size][key]) for key in keys), f"{runs[size]['feature_seconds'] / first:.1f}"]
        for size in sizes
    )
    return markdown(
        "| pixels | AUROC | precision at 100 | at 300 | estimated noise rate | true | time of the features |", rows
    )


def audit_some_classes() -> str:
    """Return the table of estimated noise rates where only some classes are noisy."""
    runs = load("audit_some_classes")["runs"]
    rows = (
        [
            name,
            *(decimals(run[key]) for key in ("wrong", "estimated")),
            " to ".join(map(decimals, run["interval"])),
            decimals(run["auroc"]),
        ]
        for name, run in runs.items()
    )
    return markdown("| labels | wrong | estimated | interval | AUROC of the list |", rows)


def digits_quality() -> str:
    """Return the table of C2D and DivideMix at 80 % with parts of SANM and another label quality."""
    found = digits_runs("digits_methods")
    mask, guess = "--model.sanm.mask false", "--model.unlabelled_quality guess"
    rows = (
        ("C2D alone", "C2D", False),
        ("with SANM", "C2D", True),
        ("masks only (`configs/sanm/amg.yaml`)", "C2D, configs/sanm/amg.yaml", True),
        (f"labels and reconstruction only (`{mask}`)", f"C2D, {mask}", True),
        (f"`{guess}`", f"C2D, {guess}", True),
        ("DivideMix alone", "DivideMix", False),
        ("with SANM", "DivideMix", True),
        (f"`{guess}`", f"DivideMix, {guess}", True),
    )
    last = "test_accuracy_last"
    return markdown(
        "| | 1 | 2 | 3 | mean |",
        (
            (name, *(decimals(run[last]) for run in found[0.8, method, sanm]), mean(found[0.8, method, sanm], last))
            for name, method, sanm in rows
        ),
    )


def audit_table(part: str, number: int) -> str:
    """Return one of the tables of ``examples/audit_cifar10.py --table``."""
    printed = audit_cifar10.tables(load("audit_cifar10"))
    section = next(text for text in printed.split("### ") if text.startswith(audit_cifar10.PARTS[part]))
    return [text for text in section.strip().split("\n\n") if text.startswith("|")][number]


def audit_or_training() -> str:
    """Return the table of the lists of ``sanm audit`` and cleanlab, and of the lists of trainings."""
    columns = ("p100", "p500", "p1000", "auroc", "ap")
    runs = [
        run["methods"] for name, run in load("audit_cifar10")["runs"].items() if name.startswith("subset/symmetric")
    ]
    rows = []
    for method, name in {
        "audit": "`sanm audit` (ImageNet weights, features from the cache)",
        "audit/self_confidence": "cleanlab, same probabilities, self-confidence; Datalab",
        "logistic/self_confidence": "cleanlab, logistic regression, self-confidence; Datalab",
    }.items():
        own = [run[method]["seconds"] for run in runs]
        source = method.partition("/")[0]
        before = [run[source]["seconds"] if source != method else 0.0 for run in runs]
        seconds = statistics.mean(map(sum, zip(own, before, strict=True)))
        rows.append((name, *(mean([run[method] for run in runs], key) for key in columns), f"{seconds:.0f}"))
    trained = load("cifar10_small_quality")["runs"]
    for arm, name in {
        "sanm": "loss mixture after SANM (cross-entropy)",
        "cross_entropy": "loss mixture after cross-entropy",
        "elr": "loss mixture after ELR",
    }.items():
        by_seed = list(trained[arm].values())
        lists = [run["label_issues"] for run in by_seed]
        keys = ("precision_at_100", "precision_at_500", "precision_at_1000", "auroc", "average_precision")
        seconds = statistics.mean(run["seconds"] for run in by_seed)
        rows.append((name, *(mean(lists, key) for key in keys), f"{seconds:.0f}"))
    return markdown("| | P@100 | P@500 | P@1000 | AUROC | AP | s |", rows)


def speed() -> str:
    """Return the table of ratios that ``make bench`` measured, with the aims."""
    found = load("bench")
    step, methods = found["step"], found["methods"]
    views = [found["views"][name]["ratio"] for name in ("weak", "rand_augment", "auto_augment", "simclr")]
    memory = [methods[name]["peak_bytes"] for name in ("SANM(CrossEntropy)", "CrossEntropy")]
    rows = (
        (
            "weak / RandAugment / AutoAugment / SimCLR views, images/s over torchvision's pipeline on PIL images in 2 workers",
            f"{' / '.join(f'{ratio:.2g}' for ratio in views)} times",
            "5 / 3 / 3 times",
        ),
        (
            "SANM(CE) step over CE step, PreAct ResNet-18, batch 128",
            f"{step['sanm_over_cross_entropy']:.2f}",
            "1.75",
        ),
        (
            "mask: fraction of that step; time of a NumPy loop over images instead",
            f"{step['mask_share_of_sanm_step']:.1%}; {step['loop_over_mask']:.1f} times as long".replace("%", " %"),
            "2 %; 12 times",
        ),
        (
            "SANM(DivideMix): fraction of an epoch outside forward, backward, optimizer (width 16)",
            f"{methods['SANM(DivideMix)']['outside_share']:.1%}".replace("%", " %"),
            "15 %",
        ),
        ("peak memory, SANM(CE) over CE (width 16, whole process)", f"{memory[0] / memory[1]:.2f}", "1.35"),
    )
    return markdown("| | measured | aim |", rows)


def million() -> str:
    """Return the table of start-up time and memory by the number of images."""
    rows = []
    for count, found in load("million").items():
        both = (found["sanm"], found["dividemix"])
        first = " / ".join(f"{one['first_step_s']:.1f}" for one in both)
        memory = " / ".join(f"{one['bytes_beyond_interpreter'] / 1e9:.2f}" for one in both)
        rows.append((f"{int(count):,}", first, memory, f"{found['sanm']['labels_npz_bytes'] / 1e6:.1f} MB"))
    return markdown(
        "| N | seconds to the first step, SANM / DivideMix | memory in GB, SANM / DivideMix | `labels.npz` |", rows
    )


def small_cifar10n() -> str:
    """Return the table of the runs on 5,000 images with labels of CIFAR-10N."""
    rows = []
    for noise in ("random1", "worst"):
        runs = load(f"cifar10n_small_{noise}")["runs"]
        for arm in (name for name in cifar10_small.ARMS if name in runs):
            for seed, run in sorted(runs[arm].items()):
                best, last = (decimals(run[f"test_accuracy_{when}"]) for when in ("best", "last"))
                rows.append((noise, cifar10_small.ARMS[arm][0], seed, best, last, f"{run['seconds'] / 60:.0f}"))
    return markdown("| labels | | seed | best | last | minutes, on a busy machine |", rows)


def study(name: str, accuracy: float | None = None) -> str:
    """Return the table of a study without published values, from ``results/studies/<name>.json``.

    Args:
        name: name of the file.
        accuracy: accuracy in percent for the column of seconds; None without it.
    """
    record = SavedRecord(ROOT / "results" / "studies" / f"{name}.json")
    _, _, cells = record.read()
    return markdown_table(rows_of(record, cells, None), None, accuracy).partition("\n\n")[0]  # without the caption


def method_pages() -> dict[str, list[str]]:
    """Return the rows of the digits study on the page of each method, by the name of the page in docs/methods/."""
    found: dict[str, list[str]] = {}
    for row in digits_methods.METHODS:
        name = digits_methods.CLASSES.get(row, row)
        page = "augdesc" if row == "AugDesc" else getattr(methods, name).__module__.rpartition(".")[2]
        found.setdefault(page, []).append(row)
    return found


def method_figures(page: str, rows: list[str]) -> str:
    """Return the last accuracies of a method alone and under SANM: digits, and the small CIFAR-10 where it was run."""
    digits, small = load("digits_noises")["runs"], load("cifar10_small_quality")["runs"]
    lines = []
    for noise, (labels, _, _) in digits_methods.NOISES.items():
        for row in rows:
            cells = [digits_methods.cell(digits.get(noise, {}).get(f"{row}{end}", {})) for end in ("", "_sanm")]
            if cells != ["not run"] * 2:
                lines.append((f"digits{'' if row == rows[0] else f', {row}'}", labels, *cells))
    audited = "sanm_audit" if page == "cross_entropy" else f"{page}_audit"
    cells = [digits_methods.cell(small.get(arm, {})) for arm in (page, audited)]
    if cells != ["not run"] * 2:
        lines.append(("CIFAR-10, 5,000 images; SANM with quality from an audit", "50 % symmetric", *cells))
    return markdown("| data | wrong labels | alone | with SANM |", lines)


TABLES: dict[str, Callable[[], str]] = {
    "which-method": which_method,
    "small-cifar10": small_cifar10,
    "small-cifar10-quality": lambda: cifar10_small.table(load("cifar10_small_quality")["runs"]),
    "small-cifar10n": small_cifar10n,
    "quickstart": quickstart,
    "digits-methods": digits_all_methods,
    "digits-methods-frame": digits_methods_frame,
    "digits-soft-targets": digits_soft_targets,
    "digits-noises": lambda: digits_methods.table(load("digits_noises")["runs"]),
    "digits-variants": lambda: digits_methods.variants_table(load("digits_noises")["runs"]),
    "digits-variants-asym": lambda: digits_methods.variants_table(load("digits_noises")["runs"], "asym40"),
    "loaders": loaders,
    "audit-image-size": audit_image_size,
    "audit-some-classes": audit_some_classes,
    "digits-quality": digits_quality,
    "clean-or-train": lambda: clean_or_train.table(load("clean_or_train")["runs"]),
    "audit-or-training": audit_or_training,
    "audit-rates": lambda: audit_table("full", 0),
    "audit-rankings": lambda: audit_table("full", 1),
    "audit-verdicts": lambda: audit_table("human", 0),
    "speed": speed,
    "million": million,
    "forward-passes": lambda: forward_passes.table(load("forward_passes")["methods"]),
    "smoke": lambda: study("smoke"),
    "digits-seconds": lambda: study("digits_seconds", 90.0),
} | {f"method-{page}": partial(method_figures, page, rows) for page, rows in method_pages().items()}
"""Functions that return the tables, by name."""


def pages() -> list[Path]:
    """Return the pages that may contain tables."""
    return [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def regenerated(page: str) -> str:
    """Return the text of a page with all its tables written anew.

    Args:
        page: Markdown with marked tables.

    Raises:
        ValueError: if a mark has a name that is not in :data:`TABLES`, or a table has no end.
    """
    if page.count("<!-- table: ") != len(MARKED.findall(page)):
        raise ValueError(
            "expected '<!-- end -->' after each '<!-- table: NAME -->', got a mark without it; add the end"
        )

    def write(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise ValueError(f"expected a table of {', '.join(TABLES)}, got {name!r}; add it to scripts/tables.py")
        return f"{name} -->\n\n{TABLES[name]()}\n\n"

    return MARKED.sub(write, page)


def main() -> None:
    """Write the tables of all pages, and print the pages that changed."""
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = regenerated(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()

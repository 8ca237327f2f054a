"""The list of wrong labels on CIFAR-10, by ``sanm audit`` and by cleanlab: how good, how fast, how large.

    pip install -e '.[pretrained,compare]'
    python examples/audit_cifar10.py --root DIR --labels cifar10n.npz --cache FOLDER --seeds 1 2 3
    python examples/audit_cifar10.py --table

DIR has ``train/<class>/0000.jpg`` (and ``test/``), CIFAR-10N's labels are in that order. Every measurement runs in a
process of its own, because of peak memory. Figures are written to results/audit_cifar10.json as they come; what is
there is not done again.

Human verdicts on CIFAR-10's test labels (``--parts human``), from github.com/cleanlab/label-errors:
``mturk/cifar10_mturk.json`` for ``--verdicts``, and for ``--test_labels``
``original_test_labels/cifar10_test_set_original_labels.npy``.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_LABELS: dict[str, Any] = {  # an array of CIFAR-10N, or arguments of sanm_lightning.data.Noise
    "worst": "worse_label",
    "random1": "random_label1",
    "aggregate": "aggre_label",
    "symmetric 50 %": {"kind": "symmetric_exclusive", "rate": 0.5},
    "asymmetric 40 %": {"kind": "asymmetric", "rate": 0.4, "mapping": "cifar10"},
    "clean": "clean_label",
}
DIGIT_LABELS: dict[str, Any] = {
    "symmetric 20 %": {"kind": "symmetric_exclusive", "rate": 0.2},
    "symmetric 50 %": {"kind": "symmetric_exclusive", "rate": 0.5},
    "pair 40 %": {"kind": "pair", "rate": 0.4},
}
PARTS = {
    "digits": "Digits (1,297 images)",
    "subset": "CIFAR-10, 5,000 images",
    "human": "CIFAR-10, test images",
    "full": "CIFAR-10, 50,000 images",
}
RANKS = (50, 100, 200, 500)
Array = np.ndarray[Any, Any]


def precision_at(order: Array, wrong: Array, n: int) -> float | None:
    """Fraction of wrong labels among the first n of an order; None where there are fewer rows or no wrong label."""
    return float(wrong[order[:n]].mean()) if len(order) >= n and wrong.any() else None


def auroc(score: Array, positive: Array) -> float | None:
    """Probability that a positive has a higher score than a negative, ties counted half; None without both."""
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else None


def average_precision(score: Array, positive: Array) -> float | None:
    """Mean over positives of the precision among all rows of at least their score; None without a positive."""
    values, place, counts = np.unique(-score, return_inverse=True, return_counts=True)
    hits = np.bincount(place, weights=positive, minlength=len(values))
    return float((hits * np.cumsum(hits) / np.cumsum(counts)).sum() / hits.sum()) if hits.sum() else None


def calibration_error(prob: Array, true: Array, bins: int = 10) -> float:
    """Expected calibration error: mean distance of probability and frequency over bins of equal width."""
    place = np.minimum((prob * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=prob - true, minlength=bins)
    return float(np.abs(gap).sum() / len(prob))


def brier(prob: Array, true: Array) -> float:
    """Mean squared distance of probability and outcome."""
    return float(np.square(prob - true).mean())


def judge(quality: Array, wrong: Array, flagged: Array, order: Array) -> dict[str, Any]:
    """Figures of one method.

    Args:
        quality: higher for labels that are believed right, shape (N,), in [0, 1].
        wrong: shape (N,), bool.
        flagged: what the method calls an issue, shape (N,), bool.
        order: all rows, worst first, as the method lists them.
    """
    quality = quality.astype(np.float64)
    found = int((flagged & wrong).sum())
    return {
        **{f"p{n}": precision_at(order, wrong, n) for n in (100, 500, 1000)},
        "auroc": auroc(-quality, wrong),
        "ap": average_precision(-quality, wrong),
        "ece": calibration_error(quality, ~wrong),
        "brier": brier(quality, ~wrong),
        "quality_right": float(quality[~wrong].mean()),
        "quality_wrong": float(quality[wrong].mean()) if wrong.any() else None,
        "flagged": int(flagged.sum()),
        "flagged_precision": found / int(flagged.sum()) if flagged.any() else None,
        "flagged_recall": found / int(wrong.sum()) if wrong.any() else None,
    }


def recall_of(order: Array, errors: Array) -> dict[str, Any]:
    """Ranks (1 is the worst) of the rows that are known errors."""
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return {
        "median_rank": float(np.median(rank[errors])),
        **{f"r{n}": float((rank[errors] <= n).mean()) for n in RANKS},
    }


# What runs in processes of its own. Only these import torch, scikit-learn and cleanlab.


def in_child(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def make_set(part: str, labels: Any, seed: int, options: argparse.Namespace) -> tuple[Any, Array]:
    """The images with noisy labels, and their right labels."""
    import torch

    from sanm_lightning.audit import AuditSet
    from sanm_lightning.data import Digits, Noise

    if part == "digits":
        source = Digits().load_train()
        images, clean, paths, table = source.images, source.labels.numpy(), None, {}
    else:
        with np.load(options.labels) as file:
            table = {key: file[key] for key in file.files}
        clean = table["clean_label"].astype(np.int64)
        rows = np.arange(len(clean))
        if part == "subset":  # 500 of each class
            draw = np.random.default_rng(seed)
            rows = np.concatenate([np.sort(draw.choice(np.flatnonzero(clean == c), 500, False)) for c in range(10)])
        clean = clean[rows]
        paths = [f"train/{NAMES[c]}/{row % 5000:04d}.jpg" for c, row in zip(clean, rows, strict=True)]
        images = [Path(options.root) / path for path in paths]
        table = {key: table[key][rows].astype(np.int64) for key in table if key.endswith(("_label", "_label1"))}
    given = (
        table[labels] if isinstance(labels, str) else Noise(**labels).apply(torch.from_numpy(clean), 10, seed).numpy()
    )
    index = None if paths is not None else np.arange(len(clean))
    return AuditSet(images, given, list(NAMES), ["all"] * len(given), paths, index), clean


def test_set(both: bool, options: argparse.Namespace) -> Any:
    """The 10,000 test images with the labels that they have; after the 50,000 training images if ``both``."""
    from sanm_lightning.audit import AuditSet

    splits = {"train": 5000, "test": 1000} if both else {"test": 1000}
    paths = [f"{split}/{name}/{k:04d}.jpg" for split, n in splits.items() for name in NAMES for k in range(n)]
    labels = np.array([NAMES.index(path.split("/")[1]) for path in paths])
    images = [Path(options.root) / path for path in paths]
    return AuditSet(images, labels, list(NAMES), [path.split("/")[0] for path in paths], paths)


def run_audit(folder: Path, part: str, labels: Any, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Audit, leave in ``folder`` what cleanlab is given, and return the figures."""
    from sanm_lightning.audit import audit_set

    if part == "human":
        data = test_set(labels == "train and test", options)
        keep = np.array([split == "test" for split in data.splits])
        clean = data.labels
    else:
        data, clean = make_set(part, labels, seed, options)
        keep = np.ones(len(clean), bool)
    begun = time.monotonic()
    # folds and choices of the audit are always those of seed 0, its default
    result = audit_set(data, folder / "features.npy", cache=options.cache, device="cpu")
    seconds = time.monotonic() - begun
    memory = peak_gib()
    given, quality, order = data.labels, result.issues.quality, result.issues.order()
    flagged = result.issues.readable & (result.issues.suggested != given) & (quality < 0.5)
    np.savez(folder / "audit.npz", probs=result.probs, given=given, clean=clean, keep=keep)
    summary = result.summary
    found = {
        "seconds": round(seconds, 1),
        "seconds_by_part": summary["seconds"],
        "peak_gib": memory,
        "estimated_rate": summary["noise_rate"],
        "interval": summary["interval"],
        "weight_decay": summary["weight_decay"],
        "probe_weight": summary["probe_weight"],
        "num_images": len(given),
        "true_rate": float((given != clean).mean()),
    }
    if part == "human":
        errors, told = confirmed(options)
        place = np.cumsum(keep) - 1
        order = place[[row for row in order if keep[row]]]
        return (
            found | told | {"flagged": int(flagged[keep].sum())} | {k: recall_of(order, e) for k, e in errors.items()}
        )
    return found | judge(quality, given != clean, flagged, order)


def confirmed(options: argparse.Namespace) -> tuple[dict[str, Array], dict[str, Any]]:
    """Positions, in the order of the files, of test labels that people found wrong.

    The published index is the original order of the test set; files are in that order within their class.
    """
    original = np.load(options.test_labels).astype(np.int64)
    verdicts = json.loads(Path(options.verdicts).read_text())
    if not (np.bincount(original) == 1000).all():
        raise ValueError(f"expected 1,000 test labels of each class, got {np.bincount(original).tolist()}")
    ids = np.array([row["id"] for row in verdicts])
    agree = int((original[ids] == [row["given_original_label"] for row in verdicts]).sum())
    if agree != len(ids):
        raise ValueError(f"{agree} of {len(ids)} verdicts are on the label of their index: another order")
    row_of = np.empty(len(original), np.int64)  # the k-th of class c in the original order is row 1000 c + k
    row_of[np.argsort(original, kind="stable")] = np.arange(len(original))
    votes = {key: np.array([row["mturk"][key] for row in verdicts]) for key in ("given", "guessed")}
    errors = {
        "not_given": row_of[ids[votes["given"] < 3]],  # no majority of the five for the given label
        "guessed": row_of[ids[votes["guessed"] >= 3]],  # a majority for one other label
    }
    counts = {key: len(rows) for key, rows in errors.items()}
    return errors, {"verdicts": len(ids), "verdicts_on_their_label": agree, "errors": counts}


def run_logistic(folder: Path) -> dict[str, Any]:
    """Out-of-fold probabilities of scikit-learn's logistic regression as it is, on standardized features."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    with np.load(folder / "audit.npz") as file:
        given = file["given"]
    begun = time.monotonic()
    features = StandardScaler(copy=False).fit_transform(np.load(folder / "features.npy"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # shuffled: rows are sorted by true class, so most wrong labels of a class would be in its first and last fold,
        # and those folds predicted by regressions that have hardly seen them
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        probs = cross_val_predict(LogisticRegression(max_iter=100), features, given, cv=folds, method="predict_proba")
    stopped = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    np.save(folder / "logistic.npy", probs)
    return {"seconds": round(time.monotonic() - begun, 1), "peak_gib": peak_gib(), "folds_at_the_cap": stopped}


def run_cleanlab(folder: Path, sources: tuple[str, ...], part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ask cleanlab, on given out-of-fold probabilities, or Datalab on features alone (``features``)."""
    with np.load(folder / "audit.npz") as file:
        given, clean, keep = file["given"], file["clean"], file["keep"]
        probs = {"audit": file["probs"]}
    if "logistic" in sources:
        probs["logistic"] = np.load(folder / "logistic.npy")
    found = {}
    # Datalab, which takes the features and more memory, comes last
    for way in ("self_confidence", "normalized_margin", "datalab", "features"):
        for source in sources:
            if (source == "features") == (way == "features"):
                rows = probs.get(source, probs["audit"])[keep].astype(np.float64)
                rows /= rows.sum(1, keepdims=True)
                found[f"{source}/{way}"] = _cleanlab(way, folder, rows, given[keep], clean[keep], part, options)
    return found


def _cleanlab(
    way: str, folder: Path, probs: Array, given: Array, clean: Array, part: str, options: argparse.Namespace
) -> dict[str, Any]:
    flagged = np.zeros(len(given), bool)
    if way in ("features", "datalab"):
        from cleanlab import Datalab

        features = np.load(folder / "features.npy", mmap_mode="r")[-len(given) :]
        begun = time.monotonic()
        lab = Datalab({"label": given}, label_name="label", verbosity=0)
        one_process = {"clean_learning_kwargs": {"find_label_issues_kwargs": {"n_jobs": 1}}}
        given_probs = None if way == "features" else probs
        lab.find_issues(features=features, pred_probs=given_probs, issue_types={"label": one_process})
        seconds = time.monotonic() - begun
        table = lab.get_issues("label")
        flagged, quality = table["is_label_issue"].to_numpy(), table["label_score"].to_numpy()
        listed = np.flatnonzero(flagged)
        listed = listed[np.argsort(quality[listed], kind="stable")]
    else:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        begun = time.monotonic()
        listed = find_label_issues(given, probs, return_indices_ranked_by=way, n_jobs=1)
        quality = get_label_quality_scores(given, probs, method=way)
        seconds = time.monotonic() - begun
        flagged[listed] = True
    rest = np.flatnonzero(~flagged)
    order = np.concatenate([listed, rest[np.argsort(quality[rest], kind="stable")]])  # what is flagged comes first
    found = {"seconds": round(seconds, 1), "peak_gib": peak_gib()}
    if part == "human":
        errors, _ = confirmed(options)
        return found | {"flagged": int(flagged.sum())} | {key: recall_of(order, rows) for key, rows in errors.items()}
    return found | judge(quality, given != clean, flagged, order)


# The file of results.


def measure(options: argparse.Namespace) -> None:
    results = json.loads(options.out.read_text()) if options.out.exists() else {"runs": {}}
    packages = ("torch", "numpy", "scikit-learn", "timm", "cleanlab")
    results |= {
        "data": "CIFAR-10 as JPEG files of quality 75, labels of CIFAR-10N or drawn; digits of scikit-learn",
        "machine": f"{os.cpu_count()} CPU cores, shared, one thread per run; {platform.machine()}, no GPU",
        "command": "python examples/audit_cifar10.py --root DIR --labels cifar10n.npz --cache FOLDER --seeds 1 2 3",
        "versions": {name: _version(name) for name in packages},
    }
    for part in options.parts:
        labels = {"digits": DIGIT_LABELS, "human": {"test": "test", "train and test": "train and test"}}
        for name, what in labels.get(part, CIFAR_LABELS).items():
            for seed in options.seeds if part in ("digits", "subset") else options.seeds[:1]:
                key = f"{part}/{name}/{seed}"
                if key in results["runs"] or (options.only and name not in options.only):
                    continue
                begun = time.monotonic()
                results["runs"][key] = {"part": part, "labels": name, "seed": seed, **_one(part, what, seed, options)}
                options.out.parent.mkdir(exist_ok=True)
                draft = options.out.with_name(options.out.name + ".tmp")
                draft.write_text(json.dumps(results, indent=1) + "\n")
                os.replace(draft, options.out)
                print(f"{key}: {time.monotonic() - begun:.0f} s", flush=True)


def _one(part: str, labels: Any, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        methods = {"audit": in_child(run_audit, folder, part, labels, seed, options)}
        sources: tuple[str, ...] = ("audit",)
        if labels != "train and test":  # cleanlab has no splits: it is given the probabilities of the test rows only
            methods["logistic"] = in_child(run_logistic, folder)
            small = methods["audit"]["num_images"] <= options.neighbors_up_to
            sources = ("audit", "logistic", "features") if small else ("audit", "logistic")
        methods |= in_child(run_cleanlab, folder, sources, part, options)
    return {"methods": methods}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


TOLD = {
    "audit": "`sanm audit`",
    "audit/self_confidence": "cleanlab, same probabilities, self-confidence",
    "audit/normalized_margin": "cleanlab, same probabilities, normalized margin",
    "audit/datalab": "Datalab, same probabilities",
    "logistic/self_confidence": "cleanlab, logistic regression, self-confidence",
    "logistic/normalized_margin": "cleanlab, logistic regression, normalized margin",
    "logistic/datalab": "Datalab, logistic regression",
    "features/features": "Datalab, features only",
}


def tables(results: dict[str, Any]) -> str:
    """Markdown tables: means over seeds."""
    lines: list[str] = []
    for part, title in PARTS.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for run in results["runs"].values():
            if run["part"] == part:
                groups.setdefault(run["labels"], []).append(run["methods"])
        if groups:
            lines += [f"### {title}", ""]
            lines += _verdict_table(groups) if part == "human" else [*_rate_table(groups), "", *_rank_table(groups)]
            lines.append("")
    return "\n".join(lines).rstrip()


def _rank_table(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    columns = ("p100", "p500", "p1000", "auroc", "ap", "flagged", "flagged_precision", "flagged_recall", "ece", "brier")
    lines = [
        "| labels | method | P@100 | P@500 | P@1000 | AUROC | AP | flagged | precision | recall | ECE | Brier "
        "| s | GiB |",
        "|" + "---|" * 14,
    ]
    for labels, runs in groups.items():
        for method, told in TOLD.items():
            if method in runs[0] and not _same_as_plain(runs, method):
                told += "; Datalab" if _same_as_plain(runs, method.replace("/self_confidence", "/datalab")) else ""
                cells = [_cell([run[method][column] for run in runs], column == "flagged") for column in columns]
                seconds = [run[method]["seconds"] + _before(run, method) for run in runs]
                memory = [max(run[method]["peak_gib"], _before(run, method, "peak_gib")) for run in runs]
                cells += [f"{np.mean(seconds):.0f}", f"{max(memory):.2f}"]
                lines.append(f"| {labels} | {told} | {' | '.join(cells)} |")
    return lines


def _same_as_plain(runs: list[dict[str, Any]], method: str) -> bool:
    """Whether Datalab gave just what cleanlab's own ranking by self-confidence gave."""
    plain = method.replace("/datalab", "/self_confidence")
    cost = ("seconds", "peak_gib")
    return method.endswith("/datalab") and all(
        run.get(method) is not None
        and {k: v for k, v in run[method].items() if k not in cost}
        == {k: v for k, v in run[plain].items() if k not in cost}
        for run in runs
    )


def _before(run: dict[str, Any], method: str, what: str = "seconds") -> float:
    """Seconds or memory of what made the probabilities that cleanlab was given."""
    source = method.split("/")[0]
    return float(run[source][what]) if "/" in method and source in run else 0.0


def _rate_table(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| labels | wrong | `sanm audit`: estimate | interval | quality of right | of wrong labels | features s "
        "| neighbors s | probe s |",
        "|" + "---|" * 9,
    ]
    for labels, runs in groups.items():
        found = [run["audit"] for run in runs]
        cells = [_cell([one[key] for one in found]) for key in ("true_rate", "estimated_rate")]
        cells.append(
            f"{_cell([one['interval'][0] for one in found])} to {_cell([one['interval'][1] for one in found])}"
        )
        cells += [_cell([one[key] for one in found]) for key in ("quality_right", "quality_wrong")]
        parts = ("features", "neighbors", "probe")
        cells += [f"{np.mean([one['seconds_by_part'][part] for one in found]):.0f}" for part in parts]
        lines.append(f"| {labels} | {' | '.join(cells)} |")
    return lines


def _verdict_table(groups: dict[str, list[dict[str, Any]]]) -> list[str]:
    recall = " | ".join(f"R@{n}" for n in RANKS)
    lines = [
        f"| probe learns from | errors | method | median rank | {recall} | flagged | s |",
        "|" + "---|" * (5 + len(RANKS) + 1),
    ]
    for labels, runs in groups.items():
        run = runs[0]
        told = {"not_given": "no majority for the given label", "guessed": "majority for one other label"}
        for kind, words in told.items():
            for method, name in TOLD.items():
                if method in run and not _same_as_plain(runs, method):
                    name += "; Datalab" if _same_as_plain(runs, method.replace("/self_confidence", "/datalab")) else ""
                    found = run[method][kind]
                    cells = [f"{found['median_rank']:.0f}", *(_cell([found[f"r{n}"]]) for n in RANKS)]
                    seconds = run[method]["seconds"] + _before(run, method)
                    cells += [f"{run[method]['flagged']}", f"{seconds:.0f}"]
                    count = run["audit"]["errors"][kind]
                    lines.append(f"| {labels} | {words} ({count}) | {name} | {' | '.join(cells)} |")
    return lines


def _cell(values: list[Any], whole: bool = False) -> str:
    if any(value is None for value in values):
        return "–"  # noqa: RUF001
    mean = float(np.mean(values))
    return f"{mean:.0f}" if whole else f"{mean:.3f}".removeprefix("0")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="folder with train/ and test/")
    parser.add_argument("--labels", type=Path, help="cifar10n.npz")
    parser.add_argument("--cache", type=Path, help="folder of cached features; by default in the user's cache folder")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="of noise and subset; the first for the full set"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["digits", "subset", "full"])
    parser.add_argument("--only", nargs="+", help="names of label sets")
    parser.add_argument("--verdicts", type=Path, help="cifar10_mturk.json")
    parser.add_argument("--test_labels", type=Path, help="cifar10_test_set_original_labels.npy")
    parser.add_argument("--neighbors_up_to", type=int, default=10_000, help="images for Datalab on features only")
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--out", type=Path, default=Path("results/audit_cifar10.json"))
    parser.add_argument("--table", action="store_true", help="print the tables of what was measured, and end")
    options = parser.parse_args(words)
    if options.table:
        print(tables(json.loads(options.out.read_text())))
        return
    needed = {"root": {"subset", "full", "human"}, "labels": {"subset", "full"}}
    needed |= {"verdicts": {"human"}, "test_labels": {"human"}}
    for name, parts in needed.items():
        if getattr(options, name) is None and parts & set(options.parts):
            parser.error(f"--{name} is needed for --parts {' '.join(sorted(parts & set(options.parts)))}")
    measure(options)


if __name__ == "__main__":
    main()

"""The comparison with cleanlab: its figures are scikit-learn's, and its table prints."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

EXAMPLE = Path(__file__).parents[2] / "examples" / "audit_cifar10.py"
compare = SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


@pytest.mark.parametrize("digits", [1, 3, 9])  # few digits: many ties
@pytest.mark.parametrize("size", [7, 200])
def test_figures_are_those_of_scikit_learn(size: int, digits: int) -> None:
    draw = np.random.default_rng(size)
    score, positive = draw.random(size).round(digits), draw.random(size) < 0.3
    positive[:2] = True, False
    assert compare.auroc(score, positive) == pytest.approx(roc_auc_score(positive, score))
    assert compare.average_precision(score, positive) == pytest.approx(average_precision_score(positive, score))
    assert compare.brier(score, positive) == pytest.approx(brier_score_loss(positive, score))


def test_calibration_error_is_the_weighted_distance_from_the_curve() -> None:
    draw = np.random.default_rng(0)
    prob = draw.random(500)
    true = draw.random(500) < prob**2
    seen, told = calibration_curve(true, prob, n_bins=10)
    sizes = np.histogram(prob, bins=10, range=(0, 1))[0]
    assert compare.calibration_error(prob, true) == pytest.approx((np.abs(seen - told) * sizes).sum() / 500)
    assert compare.calibration_error(np.ones(4), np.ones(4, bool)) == 0


def test_precision_and_ranks_at_the_top() -> None:
    wrong = np.array([False, True, True, False])
    order = np.array([2, 0, 1, 3])
    assert compare.precision_at(order, wrong, 1) == 1
    assert compare.precision_at(order, wrong, 2) == 0.5
    assert compare.precision_at(order, wrong, 5) is None
    found = compare.recall_of(np.arange(600)[::-1], np.array([599, 540, 0]))
    assert found == {"median_rank": 60, "r50": 1 / 3, "r100": 2 / 3, "r200": 2 / 3, "r500": 2 / 3}


def test_without_wrong_labels_there_is_no_precision() -> None:
    quality = np.array([0.9, 0.2])
    found = compare.judge(quality, np.zeros(2, bool), quality < 0.5, np.array([1, 0]))
    assert found["auroc"] is None and found["ap"] is None and found["p100"] is None
    assert found["flagged"] == 1 and found["flagged_precision"] == 0 and found["flagged_recall"] is None


def test_test_labels_in_the_original_order_lead_to_the_files(tmp_path: Path) -> None:
    original = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 1000))
    np.save(tmp_path / "labels.npy", original.astype(np.uint16))
    ids = [17, 4321]
    votes = [{"given": 2, "guessed": 1, "neither": 1, "both": 1}, {"given": 0, "guessed": 5, "neither": 0, "both": 0}]
    rows = [{"id": i, "given_original_label": int(original[i]), "mturk": v} for i, v in zip(ids, votes, strict=True)]
    verdicts = tmp_path / "verdicts.json"
    verdicts.write_text(json.dumps(rows))
    options = SimpleNamespace(test_labels=tmp_path / "labels.npy", verdicts=verdicts)
    errors, told = compare.confirmed(options)
    expected = [1000 * original[i] + (original[:i] == original[i]).sum() for i in ids]
    assert errors["not_given"].tolist() == expected and errors["guessed"].tolist() == expected[1:]
    assert told["verdicts_on_their_label"] == 2
    rows[0]["given_original_label"] = int(original[17] + 1) % 10
    verdicts.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="1 of 2 verdicts are on the label of their index"):
        compare.confirmed(options)


def test_the_table_prints(tmp_path: Path) -> None:
    quality, wrong = np.array([0.1, 0.9, 0.4, 0.8]), np.array([True, False, False, False])
    cost = {"seconds": 1.0, "peak_gib": 0.5}
    figures = cost | compare.judge(quality, wrong, quality < 0.5, np.argsort(quality))
    audit = figures | {
        "true_rate": 0.25, "estimated_rate": 0.3, "interval": [0.2, 0.4],
        "seconds_by_part": {"features": 1.0, "neighbors": 2.0, "probe": 3.0},
    }  # fmt: skip
    methods = {"audit": audit, "audit/self_confidence": figures, "audit/datalab": figures, "logistic": cost}
    methods["logistic/normalized_margin"] = figures
    runs = {f"subset/worst/{s}": {"part": "subset", "labels": "worst", "seed": s, "methods": methods} for s in (1, 2)}
    ranks = cost | {"flagged": 3}
    ranks |= {kind: compare.recall_of(np.arange(9), np.array([3])) for kind in ("not_given", "guessed")}
    human = {"audit": ranks | {"errors": {"not_given": 1, "guessed": 1}}, "audit/self_confidence": ranks}
    runs["human/test/1"] = {"part": "human", "labels": "test", "seed": 1, "methods": human}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": runs}))
    command = [sys.executable, str(EXAMPLE), "--table", "--out", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 + 1 + 2 + 3 + 2 + 4
    assert "| worst | .250 | .300 | .200 to .400 |" in lines[4]
    assert [line for line in lines if "self-confidence; Datalab" in line]
    assert not [line for line in lines if line.startswith("| worst | Datalab")]
    assert "| test | majority for one other label (1) | `sanm audit` | 4 | 1.000 |" in "\n".join(lines)

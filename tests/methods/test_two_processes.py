"""Two processes under plain ``ddp``: every method, alone and under SANM, warm-up epoch included; one launch for all tests.

Two processes of batch b take the steps of one of batch 2 b where a step is a mean over samples: CrossEntropy, CDR, ELR,
SimCLR (whose partners are gathered), CoTeaching while it leaves nothing out, ELR+ while it mixes nothing, and MLNT while its
look-ahead steps have length 0, each with the views and masks fixed. The definition of the others does not allow it: the small
losses of Co-teaching are the smallest of a batch, mixup has one share per batch and partners within it, the prior penalty of
DivideMix and C2D is a function of the batch's mean prediction, the look-ahead steps of MLNT and IEG are those of a batch, and
SSR draws each process's selected samples at random. There a process's batch is the batch.
"""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock  # torch brings it
from PIL import Image
from sklearn.metrics import roc_auc_score

from sanm_lightning.methods import CrossEntropy
from tests.methods.two_processes import (
    BATCH,
    CASES,
    EPOCHS,
    MEAN_CASES,
    SCORING,
    TEST,
    TRAIN,
    Dropping,
    launch,
    learn,
    stop,
)
from tests.test_pictures import ALL, RUNS, written

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")

DRAWING = {
    "ELRPlus",
    "DivideMix",
    "C2D",
    "SSR",
    "Mixup",
    "MCorrection",
    "REED",
    "RRL",
    "MOIT",
    "SelCL",
    "IEG",
}  # methods that draw, beside views and masks
CHOOSING = {*SCORING, "SelCL"}  # methods that choose the samples of an epoch after a pass over the training set
GROUPING = {"IEG", "MetaCleaner"}  # methods that choose the samples of every epoch, without such a pass
LOSS_BANKS = {
    "CrossEntropy",
    "CoTeaching",
    "CDR",
    "ELR",
    "ELRPlus",
    "GCE",
    "Nested",
}  # whose label quality is SANM's own estimate


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of the one launch, and what each of its two processes has seen."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the other workers wait, and read what the first has found
        root = root.parent
    folder = root / "two_processes"
    with FileLock(root / "two_processes.lock"):
        if not (folder / "process1.pt").exists():
            folder.mkdir(exist_ok=True)
            torch.manual_seed(5)
            encoder = CrossEntropy(num_classes=4, image_size=(16, 16), network=Dropping())
            torch.save({"state_dict": encoder.state_dict()}, folder / "encoder.pt")
            launch(folder, str(folder / "encoder.pt"))
    found = [torch.load(folder / f"process{rank}.pt", weights_only=True) for rank in (0, 1)]
    errors = "\n".join(process["error"] for process in found if "error" in process)
    assert not errors, errors
    return folder, found


class Case:
    def __init__(self, name: str, folder: Path, found: list) -> None:
        self.method, self.under_sanm = CASES[name]
        self.processes = [process[name] for process in found]
        self.middle, self.end = folder / f"{name}.middle.ckpt", folder / f"{name}.end.ckpt"


@pytest.fixture(params=CASES)
def case(request, launched) -> Case:
    return Case(request.param, *launched)


def differences(one, other, at: str = "") -> list[str]:
    """Where two nested states are not equal bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [at]
    return [] if type(one) is type(other) and one == other else [at]


def test_all_that_a_method_keeps_is_the_same_in_both_processes(case):
    one, other = (process["state"] for process in case.processes)
    assert any(key.endswith("layers.0.weight") for key in one)
    assert not differences(one, other)


def test_a_resumed_run_ends_as_the_whole_one_in_both_processes(case):
    for process in case.processes:
        assert not differences(process["state"], process["resumed"])


def test_the_checkpoint_of_rank_0_knows_every_sample(case):
    end, middle = (
        torch.load(path, weights_only=True, map_location="cpu")["state_dict"] for path in (case.end, case.middle)
    )
    # samples served to both processes, one of them twice in an epoch
    since_sync = 32 if stop(case.method) == 6 else 62
    looked_at = set()
    for key, state in end.items():
        tables = state.get("tables", {}) if isinstance(state, dict) else {}
        if key.endswith("label_quality.bank._extra_state") and case.under_sanm and case.method in LOSS_BANKS:
            assert tables["epochs"].tolist() == [EPOCHS] * TRAIN
            assert float(middle[key]["tables"]["count"].sum()) == since_sync
            looked_at.add("losses")
        elif key.startswith(("targets.", "banks.")):
            assert len(tables["value"]) == TRAIN
            assert bool((tables["value"].sum(1) > 0).all())
            assert float(middle[key]["written"]["value"].sum()) == since_sync
            looked_at.add("targets")
        elif key.startswith("division."):
            assert tables["clean"].shape == (TRAIN, 2)
            assert tables["rows"].shape == (TRAIN, 1, 2)
            assert int((tables["rows"] == 0).sum()) == 2  # a network's smallest loss, and no sample left out
            looked_at.add("division")
        elif key.startswith("selection."):
            assert len(tables["labels"]) == len(tables["quality"]) == len(tables["given_quality"]) == TRAIN
            assert bool((tables["given_quality"] + tables["quality"] > 0).any())
            looked_at.add("selection")
    expected = {"ELR": {"targets"}, "ELRPlus": {"targets"}, "DivideMix": {"division"}, "C2D": {"division"}}
    expected |= {"SSR": {"selection"}, "INCV": {"selection"}}
    losses = {"losses"} if case.under_sanm and case.method in LOSS_BANKS else set()
    assert looked_at == expected.get(case.method, set()) | losses


def test_the_processes_share_out_every_epoch(case):
    one, other = (process["trained"] for process in case.processes)
    assert list(one) == list(other) == list(range(EPOCHS))
    for epoch in one:
        if case.method in GROUPING or (case.method in CHOOSING and (epoch > 0 or case.method in ("SSR", "INCV"))):
            continue  # the method chooses, see the next test
        times = Counter(one[epoch] + other[epoch])
        assert sorted(times) == list(range(TRAIN))
        assert sorted(times.values())[-2:] == [1, 2]  # 61 samples for two: one comes twice


def test_the_sets_that_a_method_chooses_are_shared_out(case):
    if case.method not in CHOOSING and case.method != "IEG":
        return
    steps = -(-(TRAIN + 1) // 2 // BATCH)
    blocks = {"SSR": 2, "REED": 2, "SelCL": 2, "IEG": 2, "INCV": 1}.get(case.method, 4)
    one, other = (torch.tensor(process["trained"][EPOCHS - 1]).view(steps, blocks, -1) for process in case.processes)
    # the first block of SSR and of REED is drawn with replacement, the second one of IEG has the known labels
    for block in {"SSR": [1], "REED": [1], "IEG": [0]}.get(case.method, range(blocks)):
        order = torch.stack([one[:, block].flatten(), other[:, block].flatten()], 1).flatten().tolist()
        pool = set(order)
        assert len(set(order[: len(pool)])) == len(pool), "a sample came again before all had come"


def test_no_two_processes_or_steps_draw_from_one_stream(case):
    one, other = (process["streams"] for process in case.processes)
    drawn = {"augment"} | ({"mask"} if case.under_sanm else set())
    drawn |= {"mixup"} if case.method in DRAWING else set()
    assert (
        drawn <= {kind for kind in one if one[kind]} <= drawn | {"mask"}
    )  # without SANM, a mask's stream is never drawn from
    for kind in drawn:
        without_rank = []
        for rank, names in enumerate((one[kind], other[kind])):
            assert {name[1] for name in names} == {rank}  # seed, rank, epoch, step, ...
            assert len(set(names)) == len(names)
            without_rank.append([name[:1] + name[2:] for name in names])
        assert without_rank[0] == without_rank[1]  # a function of seed, rank, epoch and step, and of nothing else
    dropped = [process["dropped"] for process in case.processes]
    assert dropped[0]
    assert not set(dropped[0]) & set(dropped[1])


def test_every_test_sample_counts_once(case):
    one, other = case.processes
    tracked = "test/acc" in one["logged"]
    assert tracked is not (case.under_sanm and case.method in SCORING)
    assert sorted(one["evaluated"] + other["evaluated"]) == (list(range(TEST)) if tracked else [])
    for process in case.processes:
        for name, accuracy in process["alone"].items():
            assert not tracked or process["logged"][name] == accuracy
        assert process["tested"]["test/acc"] == process["alone"]["test/acc"]


def test_predict_answers_for_every_sample_once(case):
    one, other = case.processes
    assert sorted(one["predicted"] + other["predicted"]) == list(range(TEST))


@pytest.mark.parametrize(("name", "under"), MEAN_CASES)
def test_two_processes_take_the_steps_of_one_with_the_whole_batch(name, under, launched):
    before, whole = learn(name, under, 16)
    halves = launched[1][0][name, under]
    learnt = [key for key, value in whole.items() if float((value - before[key]).abs().max()) > 1e-3]
    assert "network.conv.weight" in learnt, "nothing was learned"
    assert under == "alone" or any("decoder" in key for key in learnt)
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["mixin", "callback"])
def test_a_module_of_ones_own_under_sanm_is_the_same_in_both_processes(way, launched):
    one, other = (process["own modules"][way] for process in launched[1])
    assert not differences(one["module"], other["module"])
    assert not differences(one["sanm"], other["sanm"])
    assert one["sanm"]["label_quality.bank._extra_state"]["tables"]["epochs"].tolist() == [3] * TRAIN
    assert float(one["hidden"]) > 0


def test_state_that_processes_compute_differently_is_that_of_rank_0_after_the_start_of_an_epoch(launched):
    for process in launched[1]:
        state = process["registered state"]
        assert state["threshold"].tolist() == [1, 1, 1]
        assert state["found"].tolist() == [True, False]


class TestEdges:
    def test_fewer_samples_than_it_takes_are_repeated(self, launched):
        for process in launched[1]:
            assert process["edges"]["one training sample"] == (2, "")
            assert process["edges"]["three training samples"] == (2, "")

    def test_batches_of_one_and_a_share_of_no_test_sample_are_refused_before_training(self, launched):
        for process in launched[1]:
            steps, sentence = process["edges"]["batches of one"]
            assert steps == 0
            assert "at least 2 samples per step and process" in sentence
            steps, sentence = process["edges"]["one test sample"]
            assert steps == 0
            assert sentence == "expected at least one sample for each of 2 processes, got 1; use at most 1 processes"

    def test_a_loss_that_is_not_a_number_in_one_process_stops_both(self, launched):
        one, other = (process["edges"]["a loss that is not a number"] for process in launched[1])
        assert one == other
        assert one[0] == 2  # at the end of the first epoch
        assert "got NaN or infinity from NaNHere, first at step 2" in one[1]


def test_skipped_files_are_in_no_row_of_either_process_and_the_others_are_divided_between_them(launched):
    folder, found = launched
    one, other = (process["skipped files"] for process in found)
    bad = {"train/ant/0.png", "train/bee/3.png", "train/bee/4.png"}
    good = {
        path.relative_to(folder / "images").as_posix() for path in (folder / "images" / "train").rglob("*.png")
    } - bad
    assert len(good) == 21
    for epoch in (0, 1):
        halves = [[path for at, path, _ in process["rows"] if at == epoch] for process in (one, other)]
        assert set(halves[0]) | set(halves[1]) == good
        assert len(set(halves[0]) & set(halves[1])) == 1  # 21 samples are one too few for two processes
        assert [len(half) for half in halves] == [11, 11]
    for _, path, total in [*one["rows"], *other["rows"]]:
        assert total == int(np.asarray(Image.open(folder / "images" / path), dtype=np.int64).sum()), path
    assert set(one["evaluated"]) | set(other["evaluated"]) == set(range(5))
    assert not differences(one["weights"], other["weights"])


def test_process_zero_draws_and_none_waits(launched):
    folder = launched[0] / "pictures"
    assert written(folder / "mixin") == {"masks", "losses", "quality"}
    for name in set(RUNS) - {"mixin"}:
        assert written(folder / name) == ALL
        assert (folder / f"{name}0.json").read_text() == (folder / f"{name}1.json").read_text()


class TestCommandLine:
    def test_a_relaunch_goes_on_in_the_run_directory_and_ends_as_the_whole_run(self, launched):
        folder, found = launched
        for process in found:
            assert not differences(process["command line"]["again"], process["command line"]["whole"])
        runs = folder / "here" / "lightning_logs"
        assert [path.name for path in runs.iterdir()] == ["version_0"]
        files = (folder / root / "lightning_logs" / "version_0" / "results.json" for root in ("here", "there"))
        results = [json.loads(file.read_text()) for file in files]
        for result in results:
            del result["seconds"], result["timing"]
        assert results[0] == results[1]
        assert results[0]["epochs"] == 3

    def test_predictions_are_complete_and_without_duplicates(self, launched):
        lines = (launched[0] / "predicted" / "predictions.csv").read_text().splitlines()
        assert lines[0] == "index,predicted_label,confidence,p_0,p_1,p_2,p_3"
        assert [line.split(",")[0] for line in lines[1:]] == [str(number) for number in range(9)]

    @pytest.mark.parametrize("root", ["here", "there"])
    def test_the_list_of_wrong_labels_is_complete_and_free_of_duplicates(self, launched, root):
        run = launched[0] / root / "lightning_logs" / "version_0"
        with (run / "label_issues.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert sorted(int(row["index"]) for row in rows) == list(range(33))
        assert np.load(run / "features.npy").any(1).all()
        np.testing.assert_allclose(np.load(run / "pred_probs.npy").sum(1), 1, atol=1e-5)
        with np.load(run / "samples.npz") as samples, np.load(run / "labels.npz") as labels:
            assert samples["labels"].tolist() == labels["labels"].tolist()
            wrong, score = labels["labels"] != labels["true_labels"], 1 - samples["quality"]
        found = json.loads((run / "results.json").read_text())["label_issues"]
        assert found["auroc"] == pytest.approx(roc_auc_score(wrong, score), abs=1e-6)

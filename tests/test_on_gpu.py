"""``scripts/on_gpu.py`` on the CPU: each part at a tiny size, and what it writes when something goes wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from sanm_lightning import methods
from sanm_lightning.callbacks import ExactResume
from sanm_lightning.methods import learned
from scripts.gpu import correctness, one_step, report, speed, training
from scripts.gpu.cases import TINY, Case, cases
from scripts.gpu.correctness import compared, dropout_resume
from scripts.gpu.decoded import DecodedCIFAR10, decode
from scripts.gpu.one_step import Step
from scripts.gpu.options import PARTS, parse
from scripts.gpu.report import Check, run_checks
from tests.full import FULL
from tests.methods.test_every_method import METHODS

ROOT = Path(__file__).parents[1]
SANM_CE = Case("CrossEntropy", True)
EVERY = [case for case in cases() if FULL or case.label in ("SANM(CrossEntropy)", "SimCLR")]


@pytest.fixture
def options(tmp_path):
    return parse(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--work", str(tmp_path)], part=True)


def test_every_method_is_a_case_alone_and_under_sanm():
    labels = {case.label for case in cases()}
    assert labels == {*METHODS, *(f"SANM({name})" for name in METHODS), "SimCLR"}
    assert next(iter(cases())).label == "CrossEntropy"
    with pytest.raises(ValueError, match=r"expected methods among ActiveBias, .*, got Magic; correct --methods"):
        next(cases(["Magic"]))


# Correctness


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.label)
def test_a_step_is_the_same_on_the_same_device_and_masks_images(case, monkeypatch):
    masked = []
    original = learned.TrainingPass.learn

    def learn(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        masked.append("masked_fraction" in self.sanm.last)
        return out

    monkeypatch.setattr(learned.TrainingPass, "learn", learn)
    found = correctness.cpu_against_device(case, TINY, "cpu")
    assert found["passed"] is True
    assert (found["loss_error"], found["gradient_error"], found["views_error"]) == (0, 0, 0)
    assert case.method == "SimCLR" or masked[-1] is case.under_sanm


def steps(change_loss=0.0, change_gradient=0.0):
    gradient = torch.arange(1.0, 5.0)
    batch = [torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)]
    boxes = [torch.tensor([[0.0, 4.0, 2.0, 6.0], [1.0, 3.0, 1.0, 3.0]])]
    expected = Step(torch.tensor(2.0), {"weight": gradient}, batch, boxes)
    changed = {"weight": gradient * (1 + change_gradient)}
    return expected, Step(torch.tensor(2.0 + change_loss), changed, batch, boxes)


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True), ({"change_loss": 1e-3}, False), ({"change_gradient": 1e-2}, False), ({"change_gradient": 1e-4}, True),
        ({"change_loss": float("nan")}, False), ({"change_gradient": float("nan")}, False),
    ],
)  # fmt: skip
def test_a_step_outside_the_tolerance_fails(change, passed):
    assert compared(*steps(**change))["passed"] is passed


def test_masks_at_another_place_are_counted():
    expected, found = steps()
    moved = found.boxes[0] + torch.tensor([[0.0], [1.0]])
    assert compared(expected, found)["moved_boxes"] == 0
    assert compared(expected, found._replace(boxes=[moved]))["moved_boxes"] == 0.5


def test_a_gradient_that_is_missing_is_an_error():
    expected, found = steps()
    with pytest.raises(ValueError, match="expected gradients of the same parameters, got a difference in weight"):
        compared(expected, found._replace(gradients={}))


def test_random_numbers_of_sanm_are_drawn_on_the_cpu_for_every_device():
    with one_step.draws_on_cpu():
        generator = learned.named_generator("mask", 1, device="meta")
        assert generator.device.type == "cpu"
        assert torch.rand(3, generator=generator, device="meta").device.type == "meta"
        drawn = torch.rand(3, generator=learned.named_generator("mask", 1))
    assert torch.equal(drawn, torch.rand(3, generator=learned.named_generator("mask", 1)))


@pytest.mark.filterwarnings("ignore")
def test_the_dropout_stream_of_a_resumed_run_is_checked(monkeypatch):
    assert dropout_resume("cpu") == {"steps": 8, "resumed_steps": 2, "passed": True}
    monkeypatch.setattr(ExactResume, "on_load_checkpoint", lambda *_: None)
    assert dropout_resume("cpu")["passed"] is False


@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_not_finite_fail_in_bf16(monkeypatch):
    assert correctness.finite_in_bf16(SANM_CE, TINY, "cpu")["passed"] is True

    def spoil(self):
        self.network.get_classifier().weight.data[0, 0] = float("nan")

    monkeypatch.setattr(methods.CrossEntropy, "on_train_end", spoil, raising=False)
    assert correctness.finite_in_bf16(SANM_CE, TINY, "cpu")["passed"] is False


@pytest.mark.filterwarnings("ignore")
def test_synchronization_is_forbidden_during_steps_only(monkeypatch):
    modes, seen = [], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Look(L.Callback):
        def on_before_backward(self, *_):
            seen.append(modes[-1] if modes else "default")

    watch = correctness.NoSynchronization(first_epoch=1)
    correctness.fit(SANM_CE, TINY, "cpu", 2, callbacks=[watch, Look()])
    assert seen == ["default", "default", "error", "error"]
    assert modes[-1] == "default"
    assert watch.steps == 2


# Speed


@pytest.mark.filterwarnings("ignore")
def test_an_epoch_is_timed_and_extrapolated_to_cifar10():
    found = speed.epoch(SANM_CE, TINY, "cpu")
    assert found["epoch_s"] > 0
    assert found["cifar10_epoch_s"] == pytest.approx(found["epoch_s"] * 50_000 / TINY.samples)
    assert found["peak_bytes"] is None


def test_the_share_of_the_matrix_rate_counts_the_pass_of_unmasked_images():
    plain, found = (speed.utilization(4, masked, "fp32", None, True) for masked in (False, True))
    assert found["mfu"] == pytest.approx(found["flop"] / found["step_s"] / found["matrix_flop_per_s"])
    assert found["flop"] > 1.3 * plain["flop"]


# Training


def test_images_are_decoded_with_the_labels_of_their_folders(tmp_path):
    root = training.toy_images(tmp_path / "images")
    assert decode(root, tmp_path) == {"train": 80, "test": 20}
    data = DecodedCIFAR10(str(tmp_path), seed=0)
    source = data.load_train()
    assert source.labels.bincount().tolist() == [8] * 10
    colors = source.images.float().mean((2, 3))
    spread = torch.stack([colors[source.labels == number].std(0) for number in range(10)]).amax()
    assert spread < 5  # images of a class have one color
    assert len(data.load_test().labels) == 20
    with pytest.raises(
        FileNotFoundError, match="expected images in train/<class>/ and test/<class>/, got none in train"
    ):
        decode(tmp_path / "nothing", tmp_path)


@pytest.fixture
def calibrated(options, monkeypatch):
    """A part with 1,000 seconds left, whose runs took 5 and 10 seconds per epoch, others 15 and 25, and one of which failed."""
    options.tiny, options.deadline = False, time.time() + 1000
    part = training.Training(options)
    part.decoded, part.audits = True, {1: Path("audit")}
    seconds = {"cross_entropy": 10.0, "sanm": 20.0, "sanm_network_features": 30.0, "slow": 50.0}
    rows = {f"{name}_seed_1": {"seconds": value, "epochs": 2} for name, value in seconds.items()}
    monkeypatch.setattr(part, "_train", lambda *_: {**rows, "sanm_pretrained_features_seed_1": {"exit_status": 2}})
    return part


def test_the_number_of_epochs_fits_the_time_that_is_left(calibrated):
    found = calibrated.calibrate()
    assert found["seconds_per_epoch"] == 15
    assert found["epochs"] == calibrated.epochs == int((calibrated.options.deadline - time.time()) * 0.85 / 15)
    calibrated.options.deadline = time.time() + 20
    calibrated.calibrate()
    entry = calibrated.fit()
    assert entry["status"] == "not run"
    assert "raise --budget" in entry["reason"]


def test_runs_that_failed_or_are_slow_are_left_out_and_named(calibrated, monkeypatch):
    left_out = calibrated.calibrate()["left_out"]
    assert left_out == {"slow_seed_1": "an epoch of 25.0 s", "sanm_pretrained_features_seed_1": "failed"}
    monkeypatch.undo()
    started = []
    monkeypatch.setattr(calibrated, "_start", lambda name, words: started.append(name))
    monkeypatch.setattr(calibrated, "_finish", lambda *_, **__: None)
    monkeypatch.setattr(calibrated, "_results", lambda *_: {"exit_status": 0})
    assert calibrated.fit()["passed"] is True
    assert started == ["fit_cross_entropy_seed_1", "fit_sanm_seed_1", "fit_sanm_network_features_seed_1"]


def test_a_run_is_stopped_at_the_deadline_and_its_output_is_kept(options):
    part = training.Training(options)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process.log = options.work / "run.log"
    process.log.write_text("the end")
    with pytest.raises(RuntimeError, match="expected exit status 0, got -9: the end"):
        part._finish([process], time.time() + 0.1)
    assert part._results("fit", "run", process) == {"exit_status": -9, "log": "the end"}


def test_training_without_images_is_not_run(options):
    options.tiny = False
    content = run_checks("training", list(training.Training(options).checks()), options)
    assert {entry["status"] for entry in content["checks"].values()} == {"not run"}
    assert content["checks"]["decode"]["reason"] == "expected a folder of images, got none; set --root"


# The report


def test_an_error_stops_no_other_check_and_each_result_is_written_at_once(options):
    def broken():
        raise RuntimeError("no kernel")

    def look():
        return {"written": json.loads((options.out / "part.json").read_text())["checks"]}

    checks = [
        Check("first", lambda: {"passed": True, "error": 1 / 3}), Check("broken", broken), Check("look", look),
        Check("cuda", dict, needs_cuda=True), Check("bad", lambda: {"passed": False, "error": float("inf")}),
    ]  # fmt: skip
    content = run_checks("part", checks, options)
    found = content["checks"]
    assert {name: entry["status"] for name, entry in found.items()} == {
        "first": "passed", "broken": "error", "look": "measured", "cuda": "not run", "bad": "failed",
    }  # fmt: skip
    assert found["first"]["error"] == 0.33333
    assert found["bad"]["error"] == "inf"
    assert found["broken"]["reason"].startswith("RuntimeError: no kernel (test_on_gpu.py:")
    assert found["cuda"]["reason"] == "expected a CUDA device, got cpu"
    before = found["look"]["written"]
    assert before["broken"]["status"] == "error"
    assert before["cuda"] == {"status": "not run", "reason": "not reached"}
    assert json.loads((options.out / "part.json").read_text()) == content
    assert {"device", "torch", "commit", "command", "lightning"} <= set(content)


def test_what_the_time_did_not_suffice_for_is_listed(options):
    options.deadline = time.time() - 1
    content = run_checks("part", [Check("late", dict)], options)
    assert content["checks"] == {"late": {"status": "not run", "reason": "the time of this part was used up"}}


def test_only_chosen_checks_run(options):
    options.only = ["step/ELR"]
    content = run_checks("part", [Check("step/ELR", dict), Check("step/GCE", dict)], options)
    assert list(content["checks"]) == ["step/ELR"]


def test_results_name_no_folder_of_the_machine():
    words = ["--root", "/here", "--tiny", "--out", "/there", "--seeds", "1", "2"]
    assert report.command(words) == "python scripts/on_gpu.py --tiny --seeds 1 2"
    assert report.plain(f"failed in {ROOT}/scripts/x.py") == "failed in scripts/x.py"


@pytest.mark.skipif(not FULL, reason="make test-all")
def test_the_whole_script_runs_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "on_gpu.py"), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for part in PARTS:
        entries = json.loads((tmp_path / "out" / f"{part}.json").read_text())["checks"]
        assert {entry["status"] for entry in entries.values()} <= {"passed", "measured", "not run"}
        assert any(entry["status"] != "not run" for entry in entries.values())
        reasons = {entry["reason"] for entry in entries.values() if entry["status"] == "not run"}
        assert reasons <= {"expected a CUDA device, got cpu", "too slow for --tiny"}

"""The files of an audit after a fit of any method, with and without SANM; for two processes see test_two_processes.py."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from sanm_lightning import SANM, CrossEntropy, Noise
from sanm_lightning.audit import LabelAudit
from sanm_lightning.audit.callback import detection_metrics
from sanm_lightning.audit.relabel import relabel
from sanm_lightning.cli import main
from sanm_lightning.data import Toy
from tests.methods.test_every_method import AtStep
from tests.methods.toy import data, method, trainer
from tests.methods.two_processes import Mixed

FILES = {"label_issues.csv", "pred_probs.npy", "features.npy", "samples.npz", "audit.json", "report.html"}
COMMAND = [
    "fit", "--model.network", "small_cnn", "--model.network_args", "{width: 4}",
    "--data", "Toy", "--data.num_samples", "61", "--data.num_test_samples", "9", "--data.batch_size", "16",
    "--data.noise.kind", "symmetric_exclusive", "--data.noise.rate", "0.3", "--data.track_test", "false",
    "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.enable_checkpointing", "false",
    "--trainer.max_epochs", "2", "--trainer.default_root_dir", "here",
]  # fmt: skip
PLAIN, TWO = ["--model", "CrossEntropy"], ["--model", "CoTeaching", "--model.noise_rate", "0.3"]
UNDER_SANM = ["--model.sanm", "SANM", "--model.warmup_epochs", "1"]
STREAMED = ["--data.resident_bytes", "0"]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])


def fit(*words: str):
    return main([COMMAND[0], *words[:2], *COMMAND[1:], *words[2:]])


def rows(folder: str | Path) -> list[dict[str, str]]:
    with (Path(folder) / "label_issues.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "results.json").read_text())


class TestFiles:
    @pytest.mark.parametrize(
        "words",
        [PLAIN, [*PLAIN, *UNDER_SANM], [*TWO, *STREAMED], [*TWO, *UNDER_SANM], [*PLAIN, *UNDER_SANM, *STREAMED]],
        ids=["plain", "sanm", "two-streamed", "two-sanm", "sanm-streamed"],
    )
    def test_they_hold_every_sample_once_with_what_the_networks_say(self, words):
        cli = fit(*words)
        here, source, module = Path("here"), cli.datamodule, cli.model
        assert {path.name for path in here.iterdir()} >= {*FILES, "results.json", "labels.npz"}
        found = rows(here)
        assert sorted(int(row["index"]) for row in found) == list(range(61))
        assert [int(row["rank"]) for row in found] == list(range(1, 62))
        quality = [float(row["quality"]) for row in found]
        assert quality == sorted(quality)
        with np.load(here / "samples.npz") as samples:
            assert samples["index"].tolist() == source.table("train").origin.tolist()
            assert samples["labels"].tolist() == source.labels.tolist()
            by_sample = samples["quality"]
        images = torch.stack([source.source_images()[i] for i in range(61)]) / 255
        with torch.no_grad():
            maps = [net.eval().forward_features(images) for net in module.networks]
            logits = [net.forward_head(m) for net, m in zip(module.networks, maps, strict=True)]
        probs = np.load(here / "pred_probs.npy")
        np.testing.assert_allclose(probs, torch.stack(logits).softmax(2).mean(0), atol=1e-5)
        np.testing.assert_allclose(
            np.load(here / "features.npy"), module.networks[0].forward_head(maps[0], pre_logits=True), atol=1e-5
        )
        for row in found:
            at = int(row["index"])
            given = int(source.labels[at])
            assert row["given_label"] == source.class_names[given]
            assert float(row["p_given"]) == pytest.approx(probs[at, given], abs=2e-6)
            assert float(row["p_suggested"]) == pytest.approx(probs[at].max(), abs=2e-6)
            assert float(row["quality"]) == pytest.approx(by_sample[at], abs=1e-6)
        summary = json.loads((here / "audit.json").read_text())
        assert summary["probabilities"] == "in-sample"
        own = "--model.sanm" in words
        assert summary["quality"].startswith("of the training" if own else "mixture on the losses of the last pass")

    def test_the_metrics_are_those_of_scikit_learn(self):
        source = fit(*PLAIN, *UNDER_SANM, "--data.num_samples", "120").datamodule
        wrong = (source.labels != source.true_labels).numpy()
        with np.load("here/samples.npz") as samples:
            score = 1 - samples["quality"]
        found = results("here")["label_issues"]
        assert set(found) == {"precision_at_100", "auroc", "average_precision"}
        assert found["auroc"] == pytest.approx(roc_auc_score(wrong, score), abs=1e-6)
        assert found["average_precision"] == pytest.approx(average_precision_score(wrong, score), abs=1e-6)
        worst = [int(row["index"]) for row in rows("here")[:100]]
        assert found["precision_at_100"] == pytest.approx(wrong[worst].mean())

    def test_a_run_folder_is_an_audit_that_labels_are_corrected_from(self):
        fit(*PLAIN, *UNDER_SANM)
        relabel("here", below=0.5, out="labels.csv")
        again = Toy(num_samples=61, noise=Noise("file", path="labels.csv"), seed=0)
        suggested = {row["index"]: row["suggested_label"] for row in rows("here") if float(row["quality"]) < 0.5}
        given = {row["index"]: row["given_label"] for row in rows("here")}
        assert any(suggested[index] != given[index] for index in suggested)
        origin = again.table("train").origin.tolist()
        assert again.labels.tolist() == [int({**given, **suggested}[str(index)]) for index in origin]

    @pytest.mark.parametrize("words", [["--audit", "false"], ["--trainer.fast_dev_run", "true"]])
    def test_nothing_is_written_where_that_is_asked_for(self, words):
        fit(*PLAIN, *UNDER_SANM, *words)
        held = {path.name for path in Path("here").iterdir()} if Path("here").exists() else set()
        assert not held & FILES

    def test_without_true_labels_there_are_no_metrics(self):
        fit(*PLAIN, "--data.noise.kind", "none", "--data.noise.rate", "0")
        assert results("here")["label_issues"] is None
        assert len(rows("here")) == 61

    def test_a_method_that_reads_no_labels_says_nothing_of_them(self):
        fit("--model", "SimCLR", "--trainer.max_epochs", "1")
        assert not {path.name for path in Path("here").iterdir()} & FILES

    def test_a_module_and_a_loader_of_ones_own_are_left_alone(self, tmp_path):
        module = Mixed(sanm=SANM())
        loader = torch.utils.data.DataLoader([(torch.rand(3, 16, 16), i % 4) for i in range(16)], 8)
        trainer(1, callbacks=[LabelAudit()], default_root_dir=tmp_path / "foreign").fit(module, loader)
        trainer(1, callbacks=[LabelAudit()], default_root_dir=tmp_path / "foreign").fit(module, data())
        assert not list(tmp_path.rglob("label_issues.csv"))


class TestQuality:
    def run(self, epochs: int, kept: int = 2, ckpt_path=None, callbacks=(), **options):
        audit, module = LabelAudit(epochs=kept), method(SANM(mu=0.4, seed=0), **options)
        torch.manual_seed(1)
        run = trainer(epochs, callbacks=[audit, *callbacks], default_root_dir=f"run{epochs}")
        run.fit(module, data(), ckpt_path=ckpt_path)
        return audit, module, run

    def test_it_is_the_mean_over_the_last_epochs(self):
        class Note(LabelAudit):
            seen = []

            def on_train_epoch_end(self, trainer, pl_module):
                self.seen.append(pl_module.sanm.label_quality.values.clone() if trainer.current_epoch else None)

            def on_fit_end(self, trainer, pl_module):
                pass

        self.run(4, callbacks=[Note()])
        with np.load("run4/samples.npz") as samples:
            np.testing.assert_allclose(samples["quality"], torch.stack(Note.seen[-2:]).mean(0), atol=1e-6)

    def test_a_resumed_run_has_that_of_the_epochs_before(self):
        self.run(4, callbacks=[AtStep(14, "middle.ckpt")])  # in the last epoch of four steps
        whole = Path("run4/label_issues.csv").read_bytes()
        for name in FILES:
            Path("run4", name).unlink()
        assert torch.load("middle.ckpt", weights_only=True)["label_audit"][0].shape == (64,)
        audit, *_ = self.run(4, ckpt_path="middle.ckpt")
        assert len(audit._qualities) == 2
        assert Path("run4/label_issues.csv").read_bytes() == whole

    def test_a_run_that_was_killed_after_its_last_step_writes_the_same_files(self):
        whole, _, run = self.run(3)
        run.save_checkpoint("end.ckpt")
        listed = Path("run3/label_issues.csv").read_bytes()
        for name in FILES:
            Path("run3", name).unlink()
        audit, *_ = self.run(3, ckpt_path="end.ckpt")
        assert Path("run3/label_issues.csv").read_bytes() == listed
        assert all(Path("run3", name).exists() for name in FILES)
        assert audit.metrics == whole.metrics is not None

    def test_a_run_without_the_callback_goes_on_from_one_with_it_and_the_other_way(self):
        *_, run = self.run(2)
        run.save_checkpoint("with.ckpt")
        bare = trainer(3)
        bare.fit(method(SANM(mu=0.4, seed=0)), data(), ckpt_path="with.ckpt")  # a warning would be an error
        bare.save_checkpoint("without.ckpt")
        audit, *_ = self.run(4, ckpt_path="without.ckpt")
        assert len(audit._qualities) == 1

    def test_the_mixture_stands_in_for_a_method_without_an_estimate(self):
        audit = LabelAudit()
        module = CrossEntropy(num_classes=4, image_size=(16, 16), network="small_cnn", network_args={"width": 4})
        source = data(num_samples=64)
        trainer(1, callbacks=[audit], default_root_dir="plain").fit(module, source)
        images = torch.stack([source.source_images()[i] for i in range(64)]) / 255
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(module.eval()(images), source.labels, reduction="none")
        with np.load("plain/samples.npz") as samples:
            order = loss.argsort()
            assert (np.diff(samples["quality"][order]) < 1e-4).all()  # a larger loss is never more trusted
        assert audit.metrics is not None

    def test_an_epoch_is_the_least(self):
        with pytest.raises(ValueError, match="expected epochs of 1 or more, got 0; use 1 for the last epoch only"):
            LabelAudit(epochs=0)


class TestMetrics:
    def test_against_scikit_learn_and_counts(self):
        draw = np.random.default_rng(0)
        quality, labels = draw.random(700), draw.integers(0, 3, 700)
        true = np.where(draw.random(700) < 0.9 * (1 - quality), (labels + 1) % 3, labels)
        found = detection_metrics(*(torch.from_numpy(part) for part in (quality, labels, true)))
        wrong, order = labels != true, np.argsort(quality)
        assert set(found) == {"precision_at_100", "precision_at_500", "auroc", "average_precision"}
        for n in (100, 500):
            assert found[f"precision_at_{n}"] == pytest.approx(wrong[order[:n]].mean())
        assert found["auroc"] == pytest.approx(roc_auc_score(wrong, -quality), abs=1e-6)
        assert found["average_precision"] == pytest.approx(average_precision_score(wrong, -quality), abs=1e-5)

    def test_where_there_is_nothing_to_find_there_are_none(self):
        quality, labels = torch.rand(5), torch.arange(5)
        assert detection_metrics(quality, labels, None) is None
        assert detection_metrics(quality, labels, labels) is None
        assert detection_metrics(quality, labels, labels + 1) is None

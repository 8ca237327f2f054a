"""Label quality from an audit, from features in training, and combined: matching, refusals, resume, and what is found."""

import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from sanm_lightning import SANM, Noise, SANMCallback, SANMMixin, methods
from sanm_lightning.batch import NoisyBatch
from sanm_lightning.cli import main
from sanm_lightning.data import Toy
from sanm_lightning.sanm.feature_quality import AuditQuality, CombinedQuality, FeatureQuality
from sanm_lightning.sanm.quality import LabelQuality, QualityEstimator, resolve_quality
from tests.full import FULL
from tests.methods.test_every_method import METHODS, AtStep, empty_sets_allowed
from tests.methods.test_every_method import encoder as encoder
from tests.methods.test_every_method import make as make
from tests.methods.toy import data, method, same, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")


def write_audit(path: Path, source, order=None, **changes) -> str:
    """Write what an audit of the training split says, in any order; the quality of the sample at position i is i / N."""
    origin, labels = source.table("train").origin.numpy(), source.labels.numpy()
    rows = np.arange(len(labels)) if order is None else order
    content = {
        "index": origin[rows],
        "splits": np.full(len(rows), "train"),
        "labels": labels[rows],
        "class_names": np.array(source.class_names),
        "quality": (rows / len(labels)).astype(np.float32),
        "readable": np.ones(len(rows), bool),
    } | changes
    path.mkdir(exist_ok=True)
    np.savez(path / "samples.npz", **{name: value for name, value in content.items() if value is not None})
    return str(path)


def audited(path: str, **options):
    return method(SANM(mu=0.4, quality=AuditQuality(path), seed=0), warmup_epochs=0, **options)


def values(module) -> torch.Tensor:
    return module.sanm.label_quality.values


class Paths(Toy):
    """Toy data whose samples have paths."""

    def sample_paths(self, split: str = "train") -> list[str]:
        return [f"{split}/{i}.png" for i in self.table(split).origin.tolist()]


class TestAuditQuality:
    def test_samples_are_matched_by_index_in_any_order(self, tmp_path):
        source = data(max_train_samples=40)
        order = np.random.default_rng(0).permutation(40)
        module = audited(write_audit(tmp_path / "a", source, order))
        trainer(1).fit(module, source)
        np.testing.assert_allclose(values(module), np.arange(40) / 40, atol=1e-6)

    def test_samples_are_matched_by_path_with_rows_of_other_splits_between(self, tmp_path):
        source = Paths(seed=3, noise=Noise("symmetric", 0.5))
        paths = np.array(source.sample_paths())
        order = np.random.default_rng(0).permutation(64)
        path = write_audit(
            tmp_path / "a", source, order, index=None, paths=np.concatenate([["test/0.png"], paths[order]]),
            splits=np.array(["test"] + ["train"] * 64), labels=np.concatenate([[0], source.labels.numpy()[order]]),
            quality=np.concatenate([[0.5], order / 64]), readable=np.ones(65, bool),
        )  # fmt: skip
        module = audited(path)
        trainer(1).fit(module, source)
        np.testing.assert_allclose(values(module), np.arange(64) / 64, atol=1e-6)

    def test_without_a_data_module_they_are_matched_by_position_in_the_training_split(self, tmp_path):
        path = write_audit(
            tmp_path / "a", data(), index=None, paths=np.array([f"{i}.png" for i in range(64)]),
            splits=np.array(["test"] * 24 + ["train"] * 40), labels=np.arange(64) % 4,
        )  # fmt: skip
        estimator = AuditQuality(path)
        estimator.fit(None)
        np.testing.assert_allclose(estimator.values, np.arange(24, 64) / 64, atol=1e-6)

    def test_class_names_are_matched_by_name(self, tmp_path):
        source = data()
        turned = write_audit(
            tmp_path / "a", source, labels=3 - source.labels.numpy(), class_names=np.array(source.class_names[::-1])
        )
        trainer(1).fit(audited(turned), source)

    def test_an_unreadable_sample_is_not_trusted(self, tmp_path):
        source = data()
        module = audited(write_audit(tmp_path / "a", source, readable=np.arange(64) != 60))
        trainer(1).fit(module, source)
        assert values(module)[60] == 0
        assert values(module)[59] == pytest.approx(59 / 64)

    def test_other_labels_are_refused_with_their_number(self, tmp_path):
        source = data()
        labels = source.labels.numpy().copy()
        labels[[3, 5, 60]] = (labels[[3, 5, 60]] + 1) % 4
        with pytest.raises(
            ValueError, match=r"expected the given labels of the audit .*, got different labels for 3 of 64 training"
        ):
            trainer(1).fit(audited(write_audit(tmp_path / "a", source, labels=labels)), source)

    def test_missing_samples_are_refused_with_their_number_and_a_name(self, tmp_path):
        source = data()
        path = write_audit(tmp_path / "a", source, np.arange(60))
        with pytest.raises(
            ValueError,
            match=r"expected all 64 training samples in the audit .*, got 4 samples without a row \(first: 'index 60'\); use",
        ):
            trainer(1).fit(audited(path), source)

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text"])
    def test_a_file_of_another_kind_is_refused(self, tmp_path, content):
        (tmp_path / "samples.npz").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"expected samples.npz of an audit in .*, got another file \(.*; run sanm"
        ):
            AuditQuality(str(tmp_path)).fit(None)

    def test_arrays_of_another_kind_and_no_file_are_refused(self, tmp_path):
        np.save(tmp_path / "array.npy", np.zeros(3))
        with pytest.raises(ValueError, match="got another file"):
            AuditQuality(str(tmp_path / "array.npy")).fit(None)
        path = write_audit(tmp_path / "a", data(), quality=None, index=None)
        with pytest.raises(ValueError, match="got a file without paths, quality; run sanm audit again"):
            AuditQuality(path).fit(None)
        with pytest.raises(
            FileNotFoundError, match=r"expected the files of an audit in 'none', got no samples.npz; run"
        ):
            AuditQuality("none").fit(None)

    def test_a_checkpoint_loads_and_resumes_without_the_file(self, tmp_path):
        source = data()
        path = write_audit(tmp_path / "a", source)
        whole, part = audited(path), audited(path)
        torch.manual_seed(1)
        trainer(3).fit(whole, data())
        torch.manual_seed(1)
        run = trainer(2)
        run.fit(part, data())
        run.save_checkpoint("part.ckpt")
        (tmp_path / "a/samples.npz").unlink()
        loaded = methods.CrossEntropy.load_from_checkpoint("part.ckpt", weights_only=True)
        assert torch.equal(values(loaded), values(whole))
        resumed = audited(path)
        trainer(3).fit(resumed, data(), ckpt_path="part.ckpt")
        assert same(whole.network, resumed.network)

    def test_it_takes_the_place_of_a_methods_own_estimate(self, tmp_path):
        source = data()
        path = write_audit(tmp_path / "a", source, quality=np.zeros(64, np.float32))
        torch.manual_seed(0)
        module = methods.SSR(
            num_classes=4, image_size=(16, 16), network="small_cnn", network_args={"width": 4}, k=5, warmup_epochs=0,
            sanm=SANM(mu=0.4, quality=AuditQuality(path)),
        )  # fmt: skip
        with empty_sets_allowed():
            trainer(1).fit(module, source)
        assert module.sanm.last["quality"] == 0

    def test_evidence_is_not_asked_for(self):
        assert not AuditQuality("a").needs_evidence
        with pytest.raises(
            ValueError, match=r"expected batches with positions .* for AuditQuality, got none; use a data"
        ):
            AuditQuality("a")(torch.zeros(2, 4), torch.zeros(2, 4))


class Plain(L.LightningModule):
    """A module of one's own whose batches are (images, labels, index)."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mine(SANMMixin, Plain):
    pass


def named(rows):
    return NoisyBatch(*torch.utils.data.default_collate(rows))


class Counted(L.LightningDataModule):
    """A foreign data module that knows the number of its samples and serves (images, labels, index)."""

    def __init__(self, source, turn=0):
        super().__init__()
        self.images = torch.stack([source.source_images()[i] for i in source.table("train").origin.tolist()]) / 255
        self.given, self.num_samples = (source.labels + turn) % 4, len(source.labels)

    def train_dataloader(self):
        rows = [(self.images[i], self.given[i], i) for i in range(self.num_samples)]
        return torch.utils.data.DataLoader(rows, 16, shuffle=True, collate_fn=named)


class TestModulesOfOnesOwn:
    @pytest.mark.parametrize("way", ["mixin", "callback"])
    @pytest.mark.parametrize("turn", [0, 1])
    def test_other_labels_are_refused_at_the_next_epoch(self, tmp_path, way, turn):
        source = data()
        sanm = SANM(quality=AuditQuality(write_audit(tmp_path / "a", source)), seed=0)
        module = Mine(sanm=sanm, sanm_network="model") if way == "mixin" else Plain()
        callbacks = [] if way == "mixin" else [SANMCallback(sanm, network="model")]
        run = trainer(4, callbacks=callbacks)
        if not turn:
            run.fit(module, Counted(source))
            np.testing.assert_allclose(sanm.label_quality.values, np.arange(64) / 64, atol=1e-6)
            return
        with pytest.raises(
            ValueError, match=r"got different labels for 64 samples of the previous epoch; audit the labels"
        ):
            run.fit(module, Counted(source, turn))
        assert run.current_epoch == 2  # the first epoch has no masks

    def test_an_audit_of_more_samples_is_refused(self, tmp_path):
        sanm = SANM(quality=AuditQuality(write_audit(tmp_path / "a", data())))
        with pytest.raises(
            ValueError, match=r"expected an audit of 48 training samples in .*, got 64; audit this training"
        ):
            trainer(2).fit(Mine(sanm=sanm, sanm_network="model"), Counted(data(num_samples=48)))

    def test_recorded_features_serve_them(self):
        sanm = SANM(quality=FeatureQuality(source="recorded"), seed=0)
        source = data()
        torch.manual_seed(0)
        trainer(6).fit(Mine(sanm=sanm, sanm_network="model"), Counted(source))
        quality = sanm.label_quality.values
        assert ((quality >= 0) & (quality <= 1)).all()
        assert quality.std() > 0.01
        right = (source.labels == source.true_labels).numpy()
        assert roc_auc_score(right, quality) > 0.6

    def test_features_of_a_pass_are_refused(self):
        module = Mine(sanm=SANM(quality=FeatureQuality()), sanm_network="model")
        with pytest.raises(
            ValueError, match=r"expected a module with predict_train .*, got Mine; set source to 'recorded'"
        ):
            trainer(2).fit(module, Counted(data()))

    def test_a_loader_alone_has_no_place_for_recorded_features(self):
        module = Mine(sanm=SANM(quality=FeatureQuality(source="recorded")), sanm_network="model")
        with pytest.raises(
            ValueError, match="expected a data module with num_samples for recorded features, got none; define"
        ):
            trainer(4).fit(module, Counted(data()).train_dataloader())


def easy(num_samples: int = 240) -> Toy:
    return Toy(
        num_samples=num_samples, num_test_samples=8, track_test=False, seed=3, noise=Noise("symmetric_exclusive", 0.3)
    )


def found_in(module, source) -> float:
    """Area under the ROC curve of quality for finding right labels."""
    return float(roc_auc_score((source.labels == source.true_labels).numpy(), values(module)))


class TestFeatureQuality:
    def learn(self, quality, source, epochs=3, **options):
        module = method(SANM(mu=0.3, quality=quality, seed=0), **options)
        torch.manual_seed(1)
        trainer(epochs).fit(module, source)
        return module

    @pytest.mark.parametrize("options", [{}, {"classifier": "neighbors", "k": 10}, {"source": "recorded"}], ids=str)
    def test_planted_wrong_labels_are_found(self, options):
        source = easy()
        module = self.learn(FeatureQuality(**options), source, epochs=4)
        assert found_in(module, source) > 0.75
        wrong = source.labels != source.true_labels
        assert values(module)[wrong].mean() + 0.2 < values(module)[~wrong].mean()

    def test_nothing_is_known_from_an_untrained_network(self):
        module = method(SANM(quality=FeatureQuality(), seed=0), warmup_epochs=0)
        seen = []

        class Note(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                seen.append((values(pl_module) is None, pl_module.sanm.last["quality"].item()))

        trainer(2, callbacks=[Note()]).fit(module, data())
        assert seen[0] == (True, 1.0)
        assert not seen[1][0]
        assert seen[1][1] < 1

    def test_it_is_renewed_every_few_epochs_and_with_momentum(self):
        class Known(FeatureQuality):
            def _quality(self, features, labels):
                return np.full(len(labels), 0.5 ** (self.fits + 1), np.float32)

        for every, momentum, expected in ((1, 0.0, 0.5**3), (2, 0.0, 0.5**2), (1, 0.25, None)):
            estimator = Known(every=every, momentum=momentum)
            module = self.learn(estimator, data(), epochs=3)  # renewed before epochs 1 and 2, and after the last
            if expected is None:
                expected = 0.25 * (0.25 * 0.5 + 0.75 * 0.25) + 0.75 * 0.125
            np.testing.assert_allclose(values(module), expected, rtol=1e-6)
            assert module.sanm.label_quality.fits == 3

    @pytest.mark.parametrize("source", ["pass", "recorded"])
    @pytest.mark.parametrize("step", [10, 12])
    def test_a_resumed_run_ends_bit_for_bit_as_the_whole(self, source, step):
        def made():
            return method(SANM(mu=0.4, quality=FeatureQuality(source=source, momentum=0.5), seed=0))

        whole, second = made(), made()
        torch.manual_seed(1)
        trainer(4, callbacks=[AtStep(step, "middle.ckpt")]).fit(whole, data())
        torch.manual_seed(7)
        trainer(4).fit(second, data(), ckpt_path="middle.ckpt")
        assert same(whole.network, second.network)
        assert torch.equal(values(whole), values(second))
        assert values(whole).std() > 0

    def test_the_second_network_is_judged_by_its_own_features(self, monkeypatch):
        torch.manual_seed(0)
        module = methods.CoTeaching(
            num_classes=4, image_size=(16, 16), network="small_cnn", network_args={"width": 4}, warmup_epochs=1,
            noise_rate=0.3, sanm=SANM(mu=0.3, quality=FeatureQuality(), seed=0),
        )  # fmt: skip
        fitted: dict[int, torch.Tensor] = {}
        renew = FeatureQuality._renew

        def watched(self, features, labels, seen):
            fitted[id(self)] = features.clone()
            renew(self, features, labels, seen)

        monkeypatch.setattr(FeatureQuality, "_renew", watched)
        source = data()
        trainer(2).fit(module, source)
        one, two = (sanm.label_quality for sanm in module.sanms)
        assert one is not two
        assert not torch.equal(one.values, two.values)
        images = torch.stack([source.source_images()[i] for i in range(64)]) / 255
        for network, estimator in zip(module.networks, (one, two), strict=True):
            with torch.no_grad():
                expected = network.eval().forward_head(network.forward_features(images), pre_logits=True)
            torch.testing.assert_close(fitted[id(estimator)], expected, rtol=1e-4, atol=1e-5)

    def test_rows_that_were_not_seen_are_trusted(self):
        estimator = FeatureQuality(source="recorded")
        estimator.recorded.reset(60)
        draw = torch.Generator().manual_seed(0)
        labels = torch.arange(60) % 2
        features = torch.randn(40, 6, 2, 2, generator=draw) + labels[:40, None, None, None]
        labels[0] = 1  # a wrong label
        targets = nn.functional.one_hot(labels[:40], 2).float()
        estimator.update(torch.zeros(40, 2), targets, torch.arange(40), features)
        estimator.fit()
        assert (estimator.values[40:] == 1).all()
        assert estimator.values[0] < 0.5

    def test_one_class_or_a_handful_say_nothing(self):
        for size, classes in ((8, 2), (40, 1)):
            estimator = FeatureQuality(source="recorded")
            estimator.recorded.reset(size)
            targets = nn.functional.one_hot(torch.arange(size) % classes, 2).float()
            estimator.update(torch.zeros(size, 2), targets, torch.arange(size), torch.randn(size, 3))
            estimator.fit()
            assert estimator.values is None

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"classifier": "forest"}, "expected classifier 'probe' or 'neighbors', got 'forest'; choose one"),
            ({"source": "file"}, "expected source 'pass' or 'recorded', got 'file'; choose one"),
            (
                {"every": 0},
                r"expected every and k of 1 or more and momentum in \[0, 1\), got 0, 20 and 0.0; change them",
            ),
            ({"momentum": 1.0}, "got 1, 20 and 1.0"),
        ],
    )
    def test_what_is_out_of_range_is_refused(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            FeatureQuality(**options)


class Fixed(QualityEstimator):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.fitted, self.updated = value, 0, 0

    def update(self, logits, targets, index=None, features=None):
        self.updated += 1

    def fit(self, module=None):
        self.fitted += 1

    def forward(self, logits, targets, index=None):
        return torch.full((len(targets),), self.value)

    @property
    def values(self):
        return torch.full((3,), self.value) if self.value else None


class TestCombinedQuality:
    def test_it_is_the_weighted_mean_and_passes_everything_on(self):
        parts = [Fixed(0.2), Fixed(0.8)]
        for weights, expected in ((None, 0.5), ([1, 2], 0.6)):
            estimator = CombinedQuality(parts, weights)
            np.testing.assert_allclose(estimator(torch.zeros(2, 4), torch.zeros(2, 4)), [expected] * 2, rtol=1e-6)
            np.testing.assert_allclose(estimator.values, [expected] * 3, rtol=1e-6)
        estimator.fit()
        estimator.update(torch.zeros(2, 4), torch.zeros(2, 4))
        assert [(part.fitted, part.updated) for part in parts] == [(1, 1)] * 2
        assert CombinedQuality([Fixed(0.2), Fixed(0.0)]).values is None

    def test_evidence_is_asked_for_where_a_part_does(self):
        assert CombinedQuality([AuditQuality("a"), LabelQuality()]).needs_evidence
        assert not CombinedQuality([AuditQuality("a"), FeatureQuality()]).needs_evidence

    def test_options_rebuild_it(self):
        made = CombinedQuality([FeatureQuality(k=3), LabelQuality(evidence="margin")], [1, 3])
        rebuilt = resolve_quality(made.options)
        assert rebuilt.weights == [0.25, 0.75]
        assert rebuilt.parts[0].k == 3
        assert rebuilt.parts[1].evidence == "margin"
        assert rebuilt.options == made.options

    @pytest.mark.parametrize("arguments", [([],), ([Fixed(0.1)], [1, 2]), ([Fixed(0.1)], [0])])
    def test_no_parts_and_wrong_weights_are_refused(self, arguments):
        with pytest.raises(ValueError, match="expected one or more estimators and a positive weight for each, got"):
            CombinedQuality(*arguments)

    def test_a_part_of_another_kind_is_refused(self):
        with pytest.raises(ValueError, match="expected a QualityEstimator or its class path, got 3; derive it from"):
            CombinedQuality([3])

    def test_it_trains_from_yaml_and_through_a_checkpoint(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["sanm"])
        Path("combined.yaml").write_text(
            "model:\n init_args:\n  sanm:\n   class_path: SANM\n   init_args:\n    quality:\n"
            "     class_path: CombinedQuality\n     init_args:\n      weights: [1, 3]\n      parts:\n"
            "      - class_path: FeatureQuality\n        init_args: {classifier: neighbors, k: 3}\n"
            "      - class_path: LabelQuality\n"
        )
        words = [
            "fit", "--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 4}",
            "--config", "combined.yaml", "--model.warmup_epochs", "1", "--data", "Toy",
            "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false", "--trainer.max_epochs", "3", "--trainer.default_root_dir", "here",
        ]  # fmt: skip
        module = main(words).model
        estimator = module.sanm.label_quality
        assert [type(part) for part in estimator.parts] == [FeatureQuality, LabelQuality]
        assert estimator.parts[0].k == 3
        assert estimator.weights == [0.25, 0.75]
        parts = [part.values for part in estimator.parts]
        torch.testing.assert_close(estimator.values, 0.25 * parts[0] + 0.75 * parts[1])
        (checkpoint,) = Path("here").rglob("last.ckpt")
        loaded = methods.CrossEntropy.load_from_checkpoint(checkpoint, weights_only=True)
        assert loaded.sanm.label_quality.weights == [0.25, 0.75]
        assert (
            torch.equal(loaded.sanm.label_quality.parts[0].values, parts[0]) or loaded.sanm.label_quality.parts[0].fits
        )


CONFIG = Path(__file__).parents[2] / "configs/sanm/features.yaml"


TAKERS = (
    METHODS
    if FULL
    else ("CrossEntropy", "CoTeaching", "ELRPlus", "DivideMix", "SSR", "MLNT", "RRL", "Nested", "PENCIL")
)


@pytest.mark.parametrize("make", [(name, "sanm") for name in TAKERS], ids="-".join, indirect=True)
def test_every_method_takes_it(make):
    module = make(sanm=SANM(mu=0.5, quality=FeatureQuality(), seed=0))
    with empty_sets_allowed():
        trainer(3).fit(module, data())
    for sanm in module.sanms:
        quality = sanm.label_quality.values
        assert quality.shape == (64,)
        assert ((quality >= 0) & (quality <= 1)).all()
        assert quality.std() > 0


def test_the_config_names_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sanm"])
    module = main([
        "fit", "--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 4}",
        "--config", str(CONFIG), "--data", "Toy", "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu",
        "--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    ]).model  # fmt: skip
    assert type(module.sanm.label_quality) is FeatureQuality
    assert module.sanm.enabled

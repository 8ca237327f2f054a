"""SANM over a stranger's module: the same training, nothing left behind, and a clear word where it cannot be."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import timm
import torch
import torchvision
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR, SequentialLR
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from sanm_lightning.batch import NoisyBatch
from sanm_lightning.data import Toy
from sanm_lightning.sanm import SANM
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.feature_extractor import shadow
from sanm_lightning.sanm.foreign_batch import has_third_index
from sanm_lightning.sanm.mixin import SANMMixin

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*",
    "ignore:.*does not have many workers",
    "ignore:`training_step` returned `None`",
    "ignore:You passed in a `val_dataloader` but have no",
    "ignore:Checkpoint directory .* exists",
)

SIZE, CLASSES = 8, 3


class Small(nn.Module):
    """A network by timm's conventions: a map of 4 x 4."""

    num_features = 8

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(dropout), nn.Linear(8, CLASSES)

    def forward_features(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x)).relu()
        return out

    def forward_head(self, features: Tensor) -> Tensor:
        out: Tensor = self.fc(self.drop(features.mean((2, 3))))
        return out

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Stranger(L.LightningModule):
    """What a user may have written before they heard of SANM."""

    def __init__(self, dropout: float = 0.1, schedule: str = "none", only_net: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: Any = Small(dropout)
        self.schedule, self.only_net = schedule, only_net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch[:2]
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        parameters = self.net.parameters() if self.only_net else self.parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        scheduler: Any
        if self.schedule == "none":
            return optimizer
        if self.schedule == "lambda":
            scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
        elif self.schedule == "one-cycle":
            scheduler = OneCycleLR(optimizer, 0.1, total_steps=40)
        else:
            parts = [LinearLR(optimizer, 0.1, total_iters=3), LambdaLR(optimizer, lambda step: 0.9**step)]
            scheduler = SequentialLR(optimizer, parts, [3])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Mixed(SANMMixin, Stranger):
    pass


class Explicit(SANMMixin, Stranger):
    """A step that calls SANM itself, as the built-in methods do."""

    wraps_training_step = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sanm.build(self.net, (SIZE, SIZE))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch[:2]
        index = batch.index if isinstance(batch, NoisyBatch) else None
        targets = F.one_hot(labels, CLASSES).float()
        quality = self.sanm.source_of_quality(targets, index) if self.sanm.masking(self.current_epoch, 1) else None
        views = self.sanm(self.net, images, targets, quality)
        features = self.net.forward_features(views.images)
        logits = self.net.forward_head(features)
        self.sanm.label_quality.update(views.unmasked(logits), targets, index)
        return F.cross_entropy(logits, views.targets) + self.sanm.reconstruction(features, images)


def pairs(size: int = 24, batch_size: int = 6) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % CLASSES
    images = (torch.rand(size, 3, SIZE, SIZE, generator=draw) + labels.view(-1, 1, 1, 1)) / CLASSES
    wrong = torch.rand(size, generator=draw) < 0.3
    return DataLoader(TensorDataset(images, torch.where(wrong, (labels + 1) % CLASSES, labels)), batch_size)


class Numbered(L.LightningDataModule):
    """A data module with ``num_samples``, whose batches have the form that ``container`` gives them."""

    num_samples, image_size = 24, (SIZE, SIZE)

    def __init__(self, container: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.container = container

    def train_dataloader(self) -> Any:
        numbers = torch.arange(24).split(6)
        return served([self.container(x, y, i) for (x, y), i in zip(pairs(), numbers, strict=True)])


def served(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def toy() -> Toy:
    sizes = {"num_samples": 24, "num_classes": CLASSES, "image_size": SIZE, "num_test_samples": 3}
    return Toy(**sizes, batch_size=6, seed=0, track_test=False)


def fit(module: Any, *callbacks: Any, data: Any = None, ckpt: Any = None, epochs: int = 3, **options: Any) -> Any:
    quiet = {
        "logger": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1,
        "limit_val_batches": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    lightning: Any = pytorch_lightning if isinstance(module, pytorch_lightning.LightningModule) else L
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **(quiet | options))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero|.*`training_step` returned")
        trainer.fit(module, pairs() if data is None else data, ckpt_path=ckpt)
    return trainer


def weights(module: nn.Module, *parts: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics of the user's own network, and of what else is given."""
    found = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor) and not k.startswith("sanm.")}
    for number, part in enumerate(parts):
        found |= {f"{number}.{k}": v for k, v in part.state_dict().items()}
    return {k: v.clone() for k, v in found.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def trained(kind: str, sanm: Callable[[], SANM], data: Any = None, **options: Any) -> tuple[Any, SANM, Any]:
    L.seed_everything(3, verbose=False)
    data = data() if data else None
    if kind == "callback":
        module, callback = Stranger(), SANMCallback(sanm())
        return module, callback.sanm, fit(module, callback, data=data, **options)
    mixed = (Mixed if kind == "mixin" else Explicit)(sanm=sanm())
    return mixed, mixed.sanm, fit(mixed, data=data, **options)


class TestThreeWaysIn:
    @pytest.mark.parametrize("data", [pairs, toy])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_mixin_callback_and_explicit_calls_train_the_same_weights(self, data: Any, precision: str) -> None:
        runs = [
            trained(kind, lambda: SANM(mu=0.5, warmup_epochs=None), data, precision=precision)
            for kind in ("explicit", "mixin", "callback")
        ]
        states = []
        for module, sanm, trainer in runs:
            assert sanm.decoder is not None
            assert trainer.callback_metrics["train/masked_fraction"] > 0.01
            assert trainer.callback_metrics["train/quality"] < 0.999
            states.append(weights(module, sanm.decoder) | {"quality": sanm.label_quality.quality})
        assert_same(states[0], states[1])
        assert_same(states[0], states[2])
        assert len(states[0]["quality"]) == (24 if data is toy else 0)

    def test_masks_and_soft_labels_reach_the_step_after_the_warm_up_and_only_then(self) -> None:
        plain, seen = list(pairs()), []

        class Looking(Stranger):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if not isinstance(self.trainer, L.Trainer):
                    return super().training_step(batch, batch_idx)  # the rehearsal
                x, y = plain[batch_idx]
                hidden = (batch[0] != x).any(1)
                seen.append(
                    (self.current_epoch, hidden, batch[1] - (F.one_hot(y, CLASSES) if y.ndim < batch[1].ndim else y))
                )
                return super().training_step(batch, batch_idx)

        fit(Looking(), SANMCallback(SANM(mu=0.3, ratio="fixed", delta=1.0)), epochs=2)
        assert [epoch for epoch, _, _ in seen] == [0] * 4 + [1] * 4
        for epoch, hidden, moved in seen:
            assert hidden.any() == moved.any() == (epoch == 1)
            if epoch == 1:
                for mask in hidden:  # one box
                    rows, columns = mask.any(1), mask.any(0)
                    assert torch.equal(mask, rows[:, None] & columns[None])
                    assert 0.04 < mask.float().mean() < 0.6
                torch.testing.assert_close(moved.min(1).values, torch.full((6,), -0.3 * (1 - 1 / CLASSES)))

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    @pytest.mark.parametrize("labels", [True, False])
    def test_with_nothing_to_hide_and_nothing_to_paint_it_is_the_bare_module(
        self, precision: str, labels: bool
    ) -> None:
        L.seed_everything(3, verbose=False)
        bare = Stranger()
        fit(bare, precision=precision)
        for kind in ("callback", "mixin"):
            module, sanm, _ = trained(kind, lambda: SANM(mu=0.0, beta=0.0, labels=labels), precision=precision)
            assert sanm.decoder is None
            assert_same(weights(bare), weights(module))

    def test_sanm_switched_off_is_the_bare_module(self) -> None:
        L.seed_everything(3, verbose=False)
        bare = Stranger()
        fit(bare)
        module, _, trainer = trained("callback", SANM.off)
        assert_same(weights(bare), weights(module))
        assert not any(name.startswith("train/") for name in trainer.callback_metrics)


class TestBatchesAndSteps:
    @pytest.mark.parametrize("kind", ["tensor", "dict", "sometimes None"])
    def test_whatever_the_step_returns(self, kind: str) -> None:
        class Returning(Stranger):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                if kind == "sometimes None" and batch_idx % 2:
                    return None
                return {"loss": loss, "more": torch.ones(2)} if kind == "dict" else loss

        L.seed_everything(3, verbose=False)
        module, callback = Returning(), SANMCallback()
        fit(module, callback)
        if kind != "sometimes None":
            reference, sanm, _ = trained("callback", SANM)
            assert sanm.decoder is not None
            assert callback.sanm.decoder is not None
            assert_same(weights(reference, sanm.decoder), weights(module, callback.sanm.decoder))

    @pytest.mark.parametrize("rows", [(0, 1, 2, 3, 4, 5) * 2, (0, 1, 2)], ids=["two views", "half of the batch"])
    def test_a_step_on_other_images_than_the_batch_has_the_evidence_of_the_batch(self, rows: tuple[int, ...]) -> None:
        class Other(Stranger):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return 0.0 * F.cross_entropy(self.net(batch[0][list(rows)]), batch[1][list(rows)])

        def evidence(kind: type[Stranger]) -> Tensor:
            L.seed_everything(3, verbose=False)
            callback = SANMCallback(SANM(reconstruct=False))
            fit(kind(dropout=0.0), callback, data=toy(), epochs=1, limit_train_batches=1)
            return callback.sanm.label_quality.bank.value

        class Whole(Stranger):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return 0.0 * super().training_step(batch, batch_idx)

        assert int((evidence(Whole) > 0).sum()) == 6
        torch.testing.assert_close(evidence(Other), evidence(Whole))

    def test_a_step_of_the_batch_alone(self) -> None:
        class Short(Stranger):
            def training_step(self, batch: Any) -> Any:  # type: ignore[override]
                return Stranger.training_step(self, batch, 0)

        L.seed_everything(3, verbose=False)
        module = Short()
        fit(module, SANMCallback())
        assert_same(weights(trained("callback", SANM)[0]), weights(module))

    @pytest.mark.parametrize(("container", "keep_unmasked"), [(list, False), (tuple, True)])
    def test_what_else_is_in_a_batch_is_passed_on(self, container: Any, keep_unmasked: bool) -> None:
        extras = []

        class Weighted(Stranger):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                assert type(batch) is container
                x, y, weight, name = batch
                extras.append((self.current_epoch, weight, name))
                return (weight * F.cross_entropy(self.net(x), y, reduction="none")).mean()

        data = [container([*batch, torch.arange(6.0), "name"]) for batch in pairs()]
        fit(Weighted(), SANMCallback(SANM(keep_unmasked=keep_unmasked)), data=served(data), epochs=2)
        epoch, weight, name = extras[-1]
        assert (epoch, name) == (1, "name")
        assert torch.equal(weight, torch.arange(6.0).repeat(1 + keep_unmasked))

    def test_a_list_has_a_method_called_index_and_no_indices(self) -> None:
        module, callback = Stranger(), SANMCallback()

        class Pairs(L.LightningDataModule):
            num_samples, image_size = 24, (SIZE, SIZE)

            def train_dataloader(self) -> Any:
                return pairs()

        fit(module, callback, data=Pairs())
        assert callback.sanm.label_quality._mixture is not None

    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    def test_a_third_element_of_positions_is_the_index(self, kind: str) -> None:
        """The same quality per sample as with a named index, and another one than without."""

        def quality(container: Any, index: bool | None = None) -> tuple[Tensor | None, dict[str, Tensor]]:
            L.seed_everything(3, verbose=False)
            sanm = SANM(seed=1)
            module = Mixed(sanm=sanm, sanm_index=index) if kind == "mixin" else Stranger()
            fit(module, *([] if kind == "mixin" else [SANMCallback(sanm, index=index)]), data=Numbered(container))
            return sanm.label_quality.values, weights(module)

        named, weights_named = quality(lambda x, y, i: NoisyBatch(x, y, i))
        third, weights_third = quality(lambda x, y, i: (x, y, i))
        assert named is not None and float(named.std()) > 0
        assert third is not None and torch.equal(third, named)
        assert_same(weights_third, weights_named)
        for values, _ in (quality(lambda x, y, i: (x, y, i), False), quality(lambda x, y, i: (x, y, y), None)):
            assert values is None or not torch.equal(values, named)

    @pytest.mark.parametrize(
        ("third", "found"),
        [
            (torch.tensor([3, 1, 5, 0, 23, 4]), True),
            (torch.tensor([3, 1, 5, 0, 24, 4]), False),  # out of range
            (torch.tensor([3, 1, 5, 0, 3, 4]), False),  # true labels repeat
            (torch.tensor([3, 1, 5, -1, 2, 4]), False),
            (torch.arange(6.0), False),
            (torch.arange(6).view(6, 1), False),
            (torch.arange(3), False),
            (list(range(6)), False),
        ],
        ids=str,
    )
    def test_other_third_elements_are_not(self, third: Any, found: bool) -> None:
        x, y = next(iter(pairs()))
        assert has_third_index((x, y, third), 24) is has_third_index([x, y, third], 24) is found
        assert not has_third_index((x[:3], y[:3], third[:3]), 24), "too few to tell"
        assert not has_third_index((x, y), 24)

    def test_an_index_that_is_promised_and_missing_or_out_of_range_is_refused(self) -> None:
        with pytest.raises(
            MisconfigurationException, match=r"expected batches \(images, labels, index\) .* got 2 elements"
        ):
            fit(Stranger(), SANMCallback(index=True), data=Numbered(lambda x, y, i: (x, y)))
        with pytest.raises(ValueError, match=r"expected sample indices in \[0, 24\), got 100 to 105"):
            fit(Stranger(), SANMCallback(index=True), data=Numbered(lambda x, y, i: (x, y, i + 100)))

    def test_soft_labels_from_the_data_are_taken_as_they_are(self) -> None:
        data = served([[x, F.one_hot(y, CLASSES).float()] for x, y in pairs()])
        L.seed_everything(3, verbose=False)
        module = Stranger()
        fit(module, SANMCallback(), data=data)
        assert_same(weights(trained("callback", SANM)[0]), weights(module))

    def test_labels_left_alone_are_the_users_own(self) -> None:
        class Indexing(Stranger):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                assert batch[1].dtype == torch.int64
                return F.nll_loss(self.net(batch[0]).log_softmax(1), batch[1])

        for keep in (False, True):
            assert (
                fit(Indexing(), SANMCallback(SANM(labels=False, keep_unmasked=keep))).callback_metrics[
                    "train/masked_fraction"
                ]
                > 0
            )

    def test_double_precision(self) -> None:
        fit(Stranger(), SANMCallback(), data=toy(), precision="64-true")


class TestTheOtherNamespace:
    def test_a_module_of_pytorch_lightning_under_its_own_trainer(self) -> None:
        class Old(pytorch_lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = Small(0.1)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                self.log("mine", 1.0)
                return F.cross_entropy(self.net(batch[0]), batch[1])

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

        class OldMixed(SANMMixin, Old):
            pass

        L.seed_everything(3, verbose=False)
        one, callback = Old(), SANMCallback()
        trainer = fit(one, callback)
        L.seed_everything(3, verbose=False)
        two = OldMixed()
        fit(two)
        assert callback.sanm.decoder is not None
        assert two.sanm.decoder is not None
        reference, sanm, _ = trained("callback", SANM)
        assert sanm.decoder is not None
        assert trainer.callback_metrics["train/masked_fraction"] > 0
        assert_same(weights(one, callback.sanm.decoder), weights(two, two.sanm.decoder))
        assert_same(weights(one, callback.sanm.decoder), weights(reference, sanm.decoder))


class TestTrainingIsTheUsersOwn:
    @pytest.mark.parametrize("kind", ["callback", "mixin"])
    @pytest.mark.parametrize(
        ("schedule", "only_net"),
        [("none", False), ("none", True), ("lambda", True), ("one-cycle", True), ("sequential", True)],
    )
    def test_stopped_and_resumed_it_ends_with_the_same_weights(
        self, tmp_path: Path, kind: str, schedule: str, only_net: bool
    ) -> None:
        options = {"schedule": schedule, "only_net": only_net}

        def run(ckpt: Path | None = None, epochs: int = 3) -> tuple[Any, SANM]:
            L.seed_everything(3 if ckpt is None else 4, verbose=False)  # whoever resumes may have another seed
            saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
            # without dropout, as no framework restores the global stream
            if kind == "callback":
                module: Any = Stranger(0.0, **options)  # type: ignore[arg-type]
                callback = SANMCallback(SANM(seed=7))
                fit(module, callback, saving, data=toy(), ckpt=ckpt, epochs=epochs)
                return module, callback.sanm
            module = Mixed(dropout=0.0, sanm=SANM(seed=7), **options)
            fit(module, saving, data=toy(), ckpt=ckpt, epochs=epochs)
            return module, module.sanm

        module, sanm = run()
        assert sanm.decoder is not None
        whole = weights(module, sanm.decoder) | {"quality": sanm.label_quality.quality}
        assert not torch.equal(whole["0.layers.0.weight"], SANM_DECODER_START(sanm))  # it was trained
        for step in (6, 8) if schedule == "none" else (10,):  # 4 steps are an epoch
            file = tmp_path / f"step={step}.ckpt"
            torch.load(file, weights_only=True)
            module, sanm = run(file)
            assert sanm.decoder is not None
            assert_same(whole, weights(module, sanm.decoder) | {"quality": sanm.label_quality.quality})

    def test_the_strangers_checkpoint_holds_the_strangers_weights_and_loads_without_sanm(self, tmp_path: Path) -> None:
        module = Stranger()
        trainer = fit(module, SANMCallback(), ModelCheckpoint(tmp_path, "last"))
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert all(name.startswith("net.") for name in state["state_dict"])
        trainer.save_checkpoint(tmp_path / "after.ckpt", weights_only=False)
        assert "sanm" in torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]["SANMCallback"]
        assert_same(weights(Stranger.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)), weights(module))

    def test_a_second_fit_with_the_same_objects_continues(self) -> None:
        for module, callbacks in ((Stranger(), [SANMCallback()]), (Mixed(), [])):
            before = set(module.__dict__), set(module._modules)
            fit(module, *callbacks)
            sanm = callbacks[0].sanm if callbacks else module.sanm  # type: ignore[attr-defined]
            first = weights(module, sanm.decoder)
            fit(module, *callbacks)
            assert not torch.equal(first["net.fc.weight"], module.net.fc.weight)
            assert not torch.equal(first["0.layers.0.weight"], sanm.decoder.layers[0].weight)
            assert (set(module.__dict__) - {"_trainer"}, set(module._modules)) == (before[0] - {"_trainer"}, before[1])

    def test_another_module_with_the_same_callback_is_refused_unless_it_is_resumed(self, tmp_path: Path) -> None:
        callback, first = SANMCallback(), Stranger()
        run = fit(first, callback)
        run.save_checkpoint(tmp_path / "a.ckpt")
        del run, first
        with pytest.raises(
            ValueError, match="no other module uses, got one that was trained with another module; create"
        ):
            fit(Stranger(), callback)
        fit(Stranger(), callback, ckpt=tmp_path / "a.ckpt", epochs=4)

    @pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from")
    def test_a_checkpoint_of_an_exception_continues_without_sanm(self, tmp_path: Path) -> None:
        class Failing(Stranger):
            def on_train_batch_end(self, *args: Any) -> None:
                if self.global_step == 6:
                    raise KeyError("mine")

        class Save(L.Callback):
            def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

        with pytest.raises(KeyError, match="mine"):
            fit(Failing(), SANMCallback(), Save())
        fit(Stranger(), ckpt=tmp_path / "a.ckpt")
        fit(Stranger(), SANMCallback(), ckpt=tmp_path / "a.ckpt")

    @pytest.mark.parametrize("fails", [False, True])
    def test_the_module_is_left_as_it_was_found(self, fails: bool) -> None:
        class Failing(Stranger):
            def on_train_batch_end(self, *args: Any) -> None:
                if fails and self.current_epoch == 1:
                    raise KeyError("mine")

        module = Failing()
        expected = {name: set(part.__dict__) for name, part in module.named_modules()}
        if fails:
            with pytest.raises(KeyError, match="mine"):
                fit(module, SANMCallback())
        else:
            fit(module, SANMCallback())
        assert {name: set(part.__dict__) for name, part in module.named_modules()} == expected
        for part in module.modules():
            for name, value in part.__dict__.items():
                assert not (name.endswith("hooks") and value), (part, name, value)

    def test_named_parameters_of_an_optimizer_stay_in_step(self) -> None:
        class Named(Stranger):
            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.net.named_parameters(), lr=0.1)

        group = fit(Named(), SANMCallback(), epochs=1).optimizers[0].param_groups[0]
        assert len(group["params"]) == len(group["param_names"]) > len(list(Small().parameters()))


def SANM_DECODER_START(sanm: SANM) -> Tensor:  # noqa: N802
    fresh = SANM(seed=sanm.seed)
    fresh.build(Small(), (SIZE, SIZE))
    assert fresh.decoder is not None
    weight: Tensor = fresh.decoder.state_dict()["layers.0.weight"]
    return weight


# Steps for the rehearsal. Each takes the module, its logits and labels.


def accuracy(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    module.log("acc", (logits.argmax(1) == y).float().mean())
    return F.cross_entropy(logits, y)


def count(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    module.log_dict({"right": (logits.argmax(1) == y).sum().float()})
    return F.cross_entropy(logits, y)


def metric_logged(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    module.metric(logits, y)
    module.log("acc", module.metric)
    return F.cross_entropy(logits, y)


def metric_updated(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    module.metric.update(logits.argmax(1), y)
    return F.cross_entropy(logits, y)


def nll(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(1), y)


def picked(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    return -logits.log_softmax(1)[range(len(y)), y].mean()


def handles_both(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    hard = y if y.ndim == 1 else y.argmax(1)
    module.metric(logits, hard)
    module.log("acc", module.metric)
    module.log("acc2", (logits.argmax(1) == hard).float().mean())
    return F.cross_entropy(logits, y, label_smoothing=0.1)


def logged_loss(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, y)
    module.log("loss", loss)
    module.mean(loss.detach())
    return loss


def restless(module: Any, logits: Tensor, y: Tensor) -> Tensor:
    RESTLESS.append(1.0)
    module.log("calls", float(len(RESTLESS)))
    return F.cross_entropy(logits, y)


RESTLESS: list[float] = []


class Stepping(Stranger):
    def __init__(self, step: Any, batch_norm_metric: bool = True) -> None:
        super().__init__()
        self.step = step
        self.metric, self.mean = MulticlassAccuracy(CLASSES), MeanMetric()
        self.updates = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if isinstance(self.trainer, L.Trainer):
            self.updates += 1
        return self.step(self, self.net(x), y)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
class TestLabelsReadAsIndices:
    @pytest.mark.parametrize("batch_size", [1, 3, 6])
    @pytest.mark.parametrize("step", [accuracy, count, metric_logged, metric_updated, nll, picked])
    def test_are_found_before_the_first_update(self, step: Any, batch_size: int) -> None:
        module = Stepping(step)
        before = weights(module)
        with pytest.raises(
            MisconfigurationException, match=r"reads its labels as class indices .*SANM\(labels=False\)"
        ):
            fit(module, SANMCallback(), data=pairs(batch_size=batch_size))
        assert module.updates == 0
        assert_same(before, weights(module))

    @pytest.mark.parametrize("predicted", range(CLASSES))
    def test_are_found_whatever_the_network_predicts(self, predicted: int) -> None:
        """One image of class 1 counts as one hit read either way: a rehearsal takes two at least."""
        module = Stepping(count)
        with torch.no_grad():
            module.net.fc.bias[predicted] += 100
        with pytest.raises(MisconfigurationException, match="reads its labels as class indices"):
            fit(module, SANMCallback(), data=pairs(batch_size=1))

    @pytest.mark.parametrize("step", [accuracy, count, metric_logged, metric_updated, nll, picked])
    def test_run_where_labels_are_left_alone(self, step: Any) -> None:
        module = Stepping(step)
        fit(module, SANMCallback(SANM(labels=False, warmup_epochs=0)), epochs=1)
        assert module.updates == 4

    @pytest.mark.parametrize(("batch_size", "precision"), [(3, "32-true"), (6, "bf16-mixed"), (6, "bf16-true")])
    @pytest.mark.parametrize("step", [handles_both, logged_loss, restless])
    def test_a_legal_step_is_not_refused(self, step: Any, batch_size: int, precision: str) -> None:
        module = Stepping(step)
        fit(module, SANMCallback(), data=pairs(batch_size=batch_size), precision=precision, epochs=2)
        assert module.updates == 2 * 24 // batch_size

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_the_rehearsal_leaves_no_trace(self, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
        def run() -> tuple[dict[str, Tensor], dict[str, float], list[Any]]:
            L.seed_everything(3, verbose=False)
            module, logger = Stepping(handles_both), Writer()
            trainer = fit(module, SANMCallback(), precision=precision, logger=logger)
            module.metric.persistent(True)
            logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
            return weights(module) | {"stream": torch.get_rng_state()}, logged, logger.written

        with_rehearsal = run()
        monkeypatch.setattr("sanm_lightning.sanm.callback.require_probabilities", lambda *args: None)
        without = run()
        assert_same(with_rehearsal[0], without[0])
        assert with_rehearsal[1:] == without[1:]


class Writer(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        self.written.append((step, metrics))


class TestRefusals:
    def refused(self, module: Any, match: str, data: Any = None, **options: Any) -> None:
        before = weights(module)
        with pytest.raises((MisconfigurationException, ValueError), match=match) as caught:
            fit(module, SANMCallback(**options), data=data)
        assert "\n" not in str(caught.value)
        assert "FeatureExtractor" not in str(caught.value)
        if data is None:
            learned = [name for name, _ in module.named_parameters()]
            after = weights(module)
            assert_same({name: before[name] for name in learned}, {name: after[name] for name in learned})
        assert not any(
            value for part in module.modules() for name, value in vars(part).items() if name.endswith("hooks")
        )

    def test_manual_optimization(self) -> None:
        module = Stranger()
        module.automatic_optimization = False
        self.refused(module, "expected automatic optimization in Stranger, got manual optimization")

    @pytest.mark.parametrize("hook", ["setup", "configure_model"])
    def test_a_network_that_a_hook_creates(self, hook: str) -> None:
        class Late(Stranger):
            def __init__(self) -> None:
                super().__init__()
                self.net = None

        setattr(Late, hook, lambda self, stage=None: setattr(self, "net", Small(0.1)))
        sentence = (
            "expected a network that Late creates in its constructor, got no parameters .*; create the network in"
        )
        self.refused(Late(), sentence)

    def test_no_linear_classifier(self) -> None:
        module = Stranger()
        module.net = nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.refused(module, "expected a linear classifier whose output is the logits of Sequential, got none")
        fit(module, SANMCallback(SANM(place="energy"), network="net"))

    def test_no_map_that_determines_the_logits(self) -> None:
        module = Stranger()
        module.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES))
        self.refused(
            module, r"feature map of more than one position, .* Sequential on images of 8 x 8 .* layer=.*place: random"
        )

    def test_a_wrong_name_of_the_network(self) -> None:
        self.refused(Stranger(), "expected a submodule 'body' .*, got none; choose one of net", network="body")

    def test_a_wrong_name_of_the_layer(self) -> None:
        self.refused(Stranger(), "expected a layer 'body' in Small", network="net", layer="body")

    def test_an_unusual_name_of_the_network(self) -> None:
        class Unusual(Stranger):
            def __init__(self) -> None:
                super().__init__()
                self.body = self.net
                del self.net

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return F.cross_entropy(self.body(batch[0]), batch[1])

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        self.refused(Unusual(), r"set another submodule with network= \(available: body\)")
        fit(Unusual(), SANMCallback(network="body"))

    def test_a_map_of_one_place(self) -> None:
        module = Stranger()
        module.net.conv = nn.Conv2d(3, 8, 8)
        self.refused(module, r"feature map of more than one position, got 1 x 1 .*Small on images of 8 x 8")

    @pytest.mark.parametrize(
        ("batch", "match"),
        [
            ({"x": torch.zeros(2, 3, 8, 8)}, r"batches \(images, labels, ...\) of tensors for SANM, got dict"),
            ([torch.zeros(2, 3, 8, 8), torch.zeros(2)], r"expected labels .* got \(2,\) of torch.float32"),
            ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, dtype=torch.int64)], r"expected labels .* torch.int64"),
        ],
    )
    @pytest.mark.parametrize("image_size", [None, (SIZE, SIZE)])
    def test_a_batch_that_is_not_images_and_labels(self, batch: Any, match: str, image_size: Any) -> None:
        self.refused(Stranger(), match, data=served([batch]), image_size=image_size)

    def test_no_batch_to_look_at(self) -> None:
        class Empty(L.LightningDataModule):
            def train_dataloader(self) -> Any:
                return iter([])

        self.refused(Stranger(), "pass image_size=", data=Empty())

    def test_a_step_that_never_runs_the_network(self) -> None:
        class Elsewhere(Stranger):
            def __init__(self) -> None:
                super().__init__()
                self.other = Small()

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return F.cross_entropy(self.other(batch[0]), batch[1])

        self.refused(Elsewhere(), r"expected the training step of Elsewhere to run the network of SANM \(Small\)")

    def test_the_oracle_without_true_labels(self) -> None:
        self.refused(
            Stranger(),
            "expected batches with true_labels for quality: oracle, got none",
            sanm=SANM(quality="oracle", warmup_epochs=0),
        )
        fit(Stranger(), SANMCallback(SANM(quality="oracle")), data=toy())


class Whole(L.LightningModule):
    """A module that is its own network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.body(x)).flatten(1))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class InParts(Whole):
    """A step that calls the parts of the network one by one."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.fc(self.pool(self.body(batch[0])).flatten(1)), batch[1])


class Split(Whole):
    """An encoder under a usual name that is no classifier by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.body
        self.classifier = self.fc


def with_net(make: Any) -> Any:
    module = Stranger()
    module.net = make()
    return module


class Headed(L.LightningModule):
    """A backbone with more outputs than classes, before a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 100)
        )
        self.head = nn.Linear(100, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.backbone(x).relu())
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.logits(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class HeadedForward(Headed):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)


def test_an_image_size_of_three_numbers_is_refused() -> None:
    data = Numbered(lambda x, y, i: (x, y, i))
    data.image_size = (3, SIZE, SIZE)  # type: ignore[assignment]
    with pytest.raises(
        MisconfigurationException, match=r"image size of one number or \(H, W\) for SANM, got \(3, 8, 8\); set"
    ):
        fit(Stranger(), SANMCallback(), data=data)


class TestBackboneBeforeAHead:
    @pytest.mark.parametrize("labels", [True, False])
    def test_is_not_taken_for_the_classifier(self, labels: bool) -> None:
        sentence = (
            r"expected the outputs of Sequential to be the logits of HeadedForward .*, got 100 of Sequential and 3 of"
        )
        with pytest.raises(MisconfigurationException, match=sentence):
            fit(HeadedForward(), SANMCallback(SANM(labels=labels)))

    def test_is_no_network_of_a_step_with_fewer_classes(self) -> None:
        sentence = (
            r"expected a training step of Headed with the 100 classes of Sequential, got IndexError .*; set network="
        )
        with pytest.raises(MisconfigurationException, match=sentence):
            fit(Headed(), SANMCallback())

    def test_the_module_itself_is_named_by_the_empty_name(self) -> None:
        callback = SANMCallback(SANM(mu=0.5), network="")
        fit(HeadedForward(), callback)
        assert callback.masked_steps > 0


class TestNetworks:
    @pytest.mark.parametrize(
        ("make", "options", "channels"),
        [
            (lambda: with_net(lambda: timm.create_model("resnet10t", num_classes=CLASSES)), {}, 512),
            (lambda: with_net(lambda: torchvision.models.resnet18(num_classes=CLASSES)), {}, 512),
            (
                lambda: with_net(
                    lambda: nn.Sequential(
                        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(6, CLASSES)
                    )
                ),
                {"network": "net", "layer": "1"},
                6,
            ),
            (
                lambda: with_net(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, CLASSES))),
                {},
                4,
            ),
            (
                lambda: with_net(
                    lambda: nn.Sequential(
                        nn.Conv2d(3, 4, 3),
                        nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(),
                        nn.Linear(4, 5),
                        nn.Linear(5, CLASSES),
                    )
                ),
                {},
                4,
            ),
            (Whole, {}, 6),
            (InParts, {}, 6),
            (Split, {}, 6),
        ],
        ids=[
            "timm",
            "torchvision",
            "own with a layer named",
            "no pooling",
            "a hidden layer before the classifier",
            "the module itself",
            "in parts",
            "encoder and classifier",
        ],
    )
    def test_are_masked_and_painted(self, make: Any, options: Any, channels: int) -> None:
        size = 64 if channels == 512 else SIZE
        data = served([[F.interpolate(x, size=size), y] for x, y in list(pairs())[:1]])
        module, callback = make(), SANMCallback(**options)
        trainer = fit(module, callback, data=data, epochs=2)
        assert callback.sanm.decoder is not None
        assert callback.sanm.decoder.shape[0] == channels
        assert trainer.callback_metrics["train/quality"] <= 1
        assert trainer.callback_metrics["train/reconstruction_loss"] > 0

    def test_a_compiled_network_is_listened_to(self) -> None:
        module = Stranger(0.0)
        module.net = torch.compile(module.net, backend="eager")
        with pytest.warns(UserWarning, match="expected Stranger to be copyable"):
            trainer = fit(module, SANMCallback(), epochs=2)
        assert trainer.callback_metrics["train/reconstruction_loss"] > 0


class TestFigures:
    @pytest.mark.parametrize("accumulate", [1, 2, 3])
    def test_are_the_means_over_the_steps_whatever_is_accumulated(self, accumulate: int) -> None:
        torch.manual_seed(0)  # a mixture may find no wrong label, and mask nothing
        losses: list[Tensor] = []
        terms: list[Tensor] = []

        class Noting(Stranger):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                if isinstance(self.trainer, L.Trainer):
                    losses.append(loss.detach())
                return loss

        class Watching(SANMCallback):
            def on_train_batch_end(self, *args: Any) -> None:
                terms.append(self.sanm.last.get("reconstruction_loss", torch.zeros(())))
                super().on_train_batch_end(*args)

        trainer = fit(Noting(), Watching(SANM(beta=0.5, seed=0)), epochs=2, accumulate_grad_batches=accumulate)
        figures = trainer.callback_metrics
        torch.testing.assert_close(figures["train/classification_loss"], torch.stack(losses[4:]).mean())
        torch.testing.assert_close(figures["train/reconstruction_loss"], torch.stack(terms[4:]).mean())
        assert 0 < figures["train/masked_fraction"] < 0.3
        assert 0 < figures["train/quality"] < 1


class TestLabelQuality:
    @pytest.mark.parametrize("data", [pairs, toy])
    def test_is_fitted_once_per_epoch_and_never_in_a_step(self, tmp_path: Path, data: Any) -> None:
        def run(ckpt: Any = None) -> list[tuple[int, int]]:
            module, callback, calls = Stranger(), SANMCallback(), []
            quality, plain = callback.sanm.label_quality, callback.sanm.label_quality.fit

            def watched(given: Any = None) -> None:
                assert given is module
                calls.append((module.trainer.current_epoch, module.trainer.global_step))
                plain(given)

            shadow(quality, "fit", watched)
            saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
                fit(module, callback, saving, data=data(), ckpt=ckpt)
            return calls

        assert run() == [(0, 0), (1, 4), (2, 8), (3, 12)]  # before each epoch, and when all is over
        assert run(tmp_path / "step=6.ckpt") == [(2, 8), (3, 12)]  # from mid-epoch
        assert run(tmp_path / "step=8.ckpt") == [(2, 8), (3, 12)]  # from the last step of an epoch

    def test_table_or_window(self) -> None:
        for data, table in ((pairs, 0), (toy, 24)):
            callback = SANMCallback()
            fit(Stranger(), callback, data=data())
            assert len(callback.sanm.label_quality.quality) == table
            assert callback.sanm.label_quality._seen == (0 if table else 72)


class TestImageSize:
    def test_comes_from_the_argument_the_data_module_or_a_batch(self) -> None:
        class Pairs(L.LightningDataModule):
            image_size = (SIZE, SIZE)
            asked = 0

            def train_dataloader(self) -> Any:
                self.asked += 1
                return pairs()

        for source in ("argument", "data", "batch"):
            data = Pairs()
            if source != "data":
                data.image_size = None  # type: ignore[assignment]
            callback = SANMCallback(image_size=(SIZE, SIZE) if source == "argument" else None)
            fit(Stranger(), callback, data=data, epochs=1)
            assert callback.sanm.decoder is not None
            assert callback.sanm.decoder.image_size == (SIZE, SIZE)
            assert data.asked == (2 if source == "batch" else 1)

    def test_the_look_at_a_batch_moves_no_stream(self) -> None:
        class Drawing(TensorDataset):
            def __getitem__(self, place: Any) -> Any:
                import random

                import numpy as np

                random.random(), np.random.rand(), torch.rand(1)
                return super().__getitem__(place)

        x, y = pairs().dataset.tensors  # type: ignore[attr-defined]
        states = []
        for image_size in (None, (SIZE, SIZE)):
            import random

            import numpy as np

            L.seed_everything(3, verbose=False)
            module = Stranger()
            fit(module, SANMCallback(image_size=image_size), data=DataLoader(Drawing(x, y), 6, shuffle=True))
            streams = {"torch": torch.get_rng_state(), "python": torch.tensor(random.random())}
            states.append(weights(module) | streams | {"numpy": torch.tensor(np.random.rand())})
        assert_same(*states)


class TestNoWaiting:
    def test_a_masked_step_asks_the_device_for_no_more_than_its_value_checks(self) -> None:
        """On the CPU only the checks of index, class and quality ranges, and one-hot's own, read a number."""
        module, callback = Stranger(0.0), SANMCallback(SANM(warmup_epochs=0))
        batch = next(iter(pairs()))
        asked = {}

        class Profiled(L.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                if trainer.global_step == 5:
                    with torch.profiler.profile(
                        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
                    ) as profile:
                        pl_module.training_step(batch, 0)
                    asked.update({event.key: event.count for event in profile.key_averages()})

        fit(module, callback, Profiled(), epochs=2)
        assert "aten::nonzero" not in asked
        assert asked.get("aten::item", 0) <= 12

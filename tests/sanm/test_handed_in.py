"""Parts that are handed in: callables and estimators through checkpoints, per-sample state, streams, the rehearsal's switch."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from sanm_lightning import CrossEntropy
from sanm_lightning.models import create_network
from sanm_lightning.per_sample import LabelStore, SampleState
from sanm_lightning.sanm import SANM, QualityEstimator
from sanm_lightning.sanm.callback import SANMCallback
from sanm_lightning.sanm.mixin import SANMMixin
from sanm_lightning.sanm.options import bound_arguments
from sanm_lightning.sanm.quality import resolve_quality
from tests.methods.toy import data, method, same, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")


def three_tenths(quality, generator=None):
    return torch.full_like(quality, 0.3)


def mean_of_features(look):
    return look.features.mean(1)


class Edge:
    """A callable with arguments of its own."""

    def __init__(self, column: int = 0) -> None:
        self.options = {"column": column}

    def __call__(self, look):
        maps = torch.zeros(len(look.images), *look.features.shape[2:])
        maps[:, :, self.options["column"]] = 1
        return maps


class Gained(QualityEstimator):
    def __init__(self, scale: float, **options) -> None:
        super().__init__()
        self.scale, self.others = scale, options

    def forward(self, logits, targets, index=None):
        return torch.full((len(targets),), self.scale)


class TestThroughACheckpoint:
    @pytest.mark.parametrize(
        ("name", "value"), [("ratio", three_tenths), ("place", mean_of_features), ("place", Edge(column=2))]
    )
    def test_a_callable_is_found_again_and_a_run_resumes(self, name, value, tmp_path):
        whole, part = (method(SANM(mu=0.4, seed=0, **{name: value})) for _ in range(2))
        L.seed_everything(1, verbose=False)
        trainer(3).fit(whole, data())
        L.seed_everything(1, verbose=False)
        run = trainer(2)
        run.fit(part, data())
        run.save_checkpoint(tmp_path / "a.ckpt")
        loaded = CrossEntropy.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
        found = loaded.sanm.saliency if name == "place" else loaded.sanm.ratio_of
        assert found is value or (type(found) is Edge and found.options == {"column": 2})
        resumed = method(SANM(mu=0.4, seed=0, **{name: value}))
        trainer(3).fit(resumed, data(), ckpt_path=tmp_path / "a.ckpt")
        assert same(whole.network, resumed.network)

    def test_what_cannot_be_imported_is_named_when_the_checkpoint_is_loaded_alone(self, tmp_path):
        module, run = method(SANM(ratio=lambda quality, generator=None: 0.3 * quality)), trainer(2)
        run.fit(module, data())
        run.save_checkpoint(tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"expected a ratio among .* got '.*test_handed_in.*<lambda>'"):
            CrossEntropy.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)

    def test_an_estimator_is_rebuilt_with_all_that_it_was_made_with(self):
        made = Gained(0.25, depth=3, look=three_tenths)
        rebuilt = resolve_quality(made.options)
        assert (rebuilt.scale, rebuilt.others["depth"]) == (0.25, 3)
        assert made.options["init_args"]["look"] == {"class_path": f"{__name__}.three_tenths"}
        assert SANM.from_options(SANM(quality=made).options).label_quality.scale == 0.25

    def test_arguments_without_a_name_are_refused(self):
        def made(self, *parts):
            pass

        with pytest.raises(TypeError, match="expected arguments by name"):
            bound_arguments(made, None, 1, 2)

    @pytest.mark.parametrize("make", [resolve_quality, SANM.from_options])
    @pytest.mark.parametrize("path", ["Nowhere", "no.such.Thing", "torch.nn.Linear", "torch.nn.NoSuchThing"])
    def test_a_wrong_class_path_ends_in_a_sentence(self, make, path):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            make({"class_path": path})


class Alone(L.LightningModule):
    """A stranger that keeps per-sample state and reads its labels as class indices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = create_network("small_cnn", 4, width=4)
        self.seen = SampleState()
        self.seen.add_state("times", dtype=torch.int64)
        self.labels, self.synced = LabelStore(), 0
        self.seen.sync = self.count_sync

    def count_sync(self) -> None:
        self.synced += 1

    def training_step(self, batch, batch_idx):
        self.seen.write("times", batch.index, torch.ones_like(batch.index))
        return F.cross_entropy(self.network(batch.images), batch.labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mixed(SANMMixin, Alone):
    pass


def test_the_states_of_a_stranger_are_sized_synced_and_saved_once(tmp_path):
    for module, callbacks in ((Alone(), [SANMCallback(SANM(seed=0))]), (Mixed(sanm=SANM(seed=0)), [])):
        run = trainer(2, callbacks=callbacks)
        run.fit(module, data())
        assert len(module.seen) == len(module.labels) == 64
        assert module.synced == 2
        assert torch.equal(module.seen.times, torch.ones(64, dtype=torch.int64))
        run.save_checkpoint(tmp_path / "a.ckpt")
        kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]["seen._extra_state"]
        assert torch.equal(kept["tables"]["times"], module.seen.times)


class Reader(Alone):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("hits", (self.network(batch.images).argmax(1) == self.indices(batch.labels)).float().mean())
        return loss

    def indices(self, labels):
        return labels  # of class probabilities: wrong


class MixedReader(SANMMixin, Reader):
    pass


@pytest.mark.parametrize("mixin", [False, True])
def test_the_rehearsal_can_be_switched_off(mixin):
    def run(rehearse: bool) -> list:
        read = []  # a rehearsal on a copy reads here, too: functions are not copied
        sanm = SANM(seed=0, warmup_epochs=0)
        module = MixedReader(sanm=sanm, sanm_rehearse=rehearse) if mixin else Reader()
        module.indices = lambda labels: read.append(labels) or (labels if rehearse else labels.argmax(1))
        callbacks = [] if mixin else [SANMCallback(sanm, rehearse=rehearse)]
        trainer(1, callbacks=callbacks).fit(module, data())
        return read

    with pytest.raises(MisconfigurationException, match="reads its labels as class indices"):
        run(True)
    assert [labels.shape for labels in run(False)] == [(16, 4)] * 4


def test_the_mixin_after_its_module_is_refused():
    with pytest.raises(TypeError, match=r"expected SANMMixin before LightningModule .* write class Wrong\(SANMMixin"):
        type("Wrong", (L.LightningModule, SANMMixin), {})


def test_masked_steps_go_on_where_a_checkpoint_left_them(tmp_path):
    def run(epochs, ckpt=None):
        callback = SANMCallback(SANM(mu=0.5, ratio="fixed", seed=0, warmup_epochs=1))
        made = trainer(epochs, callbacks=[callback])
        made.fit(Alone(), data(), ckpt_path=ckpt)
        made.save_checkpoint(tmp_path / "a.ckpt")
        return callback.masked_steps

    assert run(3) == 8
    assert run(2) == 4
    assert run(4, tmp_path / "a.ckpt") == 12


class TestViews:
    @pytest.fixture
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return create_network("small_cnn", 4, width=4)

    images, targets = (
        torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        torch.eye(4)[[0, 1, 2, 3, 0, 1]],
    )

    def made(self, network, **options) -> SANM:
        sanm = SANM(seed=0, **options)
        sanm.build(network, (16, 16))
        return sanm

    @pytest.mark.parametrize("part", ["mask", "labels", "reconstruct"])
    def test_say_that_sanm_is_at_work_whichever_part_is_on(self, network, part):
        parts = {name: name == part for name in ("mask", "labels", "reconstruct")}
        sanm = self.made(network, **parts)
        assert not sanm(network, self.images, self.targets, None).masked
        views = sanm(network, self.images, self.targets, torch.zeros(6))
        assert views.masked
        assert (views.box is not None) is (part == "mask")

    def test_that_are_named_count_and_not_those_of_the_last_call(self, network):
        sanm = self.made(network, beta=1.0)
        views = sanm(network, self.images, self.targets, torch.zeros(6))
        features = network.forward_features(views.images)
        expected = sanm.reconstruction(features, self.images)
        assert expected > 0
        idle = sanm(network, self.images, self.targets, None)
        assert torch.equal(sanm.reconstruction(features, self.images, views), expected)
        assert sanm.reconstruction(features, self.images, idle) == 0

    def test_are_drawn_from_the_generator_that_is_handed_in_or_from_the_stream_of_the_call(self, network):
        def boxes(sanm, seed=None):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            return sanm(network, self.images, self.targets, torch.zeros(6), generator=generator).images

        one, other = self.made(network), self.made(network)
        assert torch.equal(boxes(one, 5), boxes(one, 5))
        assert not torch.equal(boxes(one, 5), boxes(one, 6))
        assert one.get_extra_state()["steps"] == 4
        for _ in range(4):
            boxes(other)
        own = boxes(one)
        assert torch.equal(own, boxes(other))
        assert not torch.equal(own, boxes(one))

"""Pictures of a run: what is drawn, which samples are chosen, and that nothing is changed or lost."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import SANM, SANMCallback, SANMMixin
from sanm_lightning.data import Toy
from sanm_lightning.functional import fit_mixture, mixture_posterior
from sanm_lightning.methods import CoTeaching, DivideMix
from sanm_lightning.pictures import (
    SampleBlock,
    SANMPictures,
    callback,
    draw_views,
    histogram_figure,
    quality_figure,
    roc_figure,
    samples_figure,
    transition_figure,
)
from sanm_lightning.pictures.charts import crossings
from sanm_lightning.pictures.evidence import Losses
from sanm_lightning.pictures.loggers import log_picture
from sanm_lightning.pictures.look import choose
from sanm_lightning.pictures.style import drawing, save
from sanm_lightning.sanm import LabelQuality, Views
from tests.full import FULL
from tests.methods.toy import data, method, trainer

ALL = {"masks", "losses", "quality", "roc", "transition"}
NAMES = ["ant", "bee $x$", "a cat\nof some length", "dog"]


class Named(Toy):
    @property
    def class_names(self):
        return NAMES


class Unknown(Toy):
    """Labels that nobody knows to be right."""

    @property
    def curated(self):
        return False


class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mixed(SANMMixin, Plain):
    pass


@pytest.fixture
def figures(monkeypatch):
    """The figures of a run by name. Their files are empty: rendering takes longer than the training."""
    found = {}

    def keep(figure, path):
        found[path.stem] = figure
        path.parent.mkdir(exist_ok=True)
        path.touch()

    monkeypatch.setattr(callback, "save", keep)
    return found


def texts(figure) -> str:
    from matplotlib.text import Text

    return "\n".join(part.get_text() for part in figure.findobj(Text))


def written(folder) -> set[str]:
    return {path.stem for path in (folder / "pictures").glob("*")}


def loader() -> DataLoader:
    draw = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(24, 3, 16, 16, generator=draw), torch.arange(24) % 4), 8)


@pytest.mark.usefixtures("figures")
class TestFiles:
    def test_all_are_written_show_something_and_are_readable_in_print(self, tmp_path, figures):
        from matplotlib.text import Text

        trainer(3, callbacks=[SANMPictures(4)]).fit(method(SANM(seed=0)), Named(seed=3, noise=data().noise))
        assert written(tmp_path) == set(figures) == ALL
        for name, figure in figures.items():
            path = tmp_path / "pictures" / f"{name}.png"
            save(figure, path)
            with Image.open(path) as image:
                picture = np.asarray(image.convert("L"))
            assert min(picture.shape) > 200, path
            assert picture.std() > 10, path
            assert (picture[:, -1] == 255).mean() > 0.9, path  # nothing runs over the edge
            assert (picture[:, 0] == 255).mean() > 0.9, path
        said = texts(figures["masks"])
        assert "given ant" in said or "given dog" in said or r"given bee \$x\$" in said
        assert all(word in said for word in ("true ", "pred. ", "G ", "mask ", "Believed right", "Believed wrong"))
        assert {"ant", "dog", r"bee \$x\$", "a cat of some…"} <= set(texts(figures["transition"]).split("\n"))
        for figure in figures.values():  # readable in print
            assert figure.get_size_inches()[0] <= 7
            assert all(part.get_fontsize() >= 8 for part in figure.findobj(Text) if part.get_text())

    def test_leave_the_training_alone(self):
        states, streams = [], []
        for callbacks in ([SANMPictures(4)], []):
            module = method(SANM(seed=0))
            torch.manual_seed(7)
            trainer(3, callbacks=callbacks).fit(module, data())
            states.append({name: part for name, part in module.state_dict().items() if isinstance(part, torch.Tensor)})
            streams.append((torch.get_rng_state(), module.sanm.get_extra_state(), module.sanm.last["quality"]))
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
        assert torch.equal(streams[0][0], streams[1][0])
        assert streams[0][1:] == streams[1][1:]

    def test_nothing_is_written_under_fast_dev_run(self, tmp_path):
        trainer(1, callbacks=[SANMPictures()], fast_dev_run=True).fit(method(SANM(seed=0)), data())
        assert not written(tmp_path)

    def test_a_picture_that_fails_costs_a_warning(self, tmp_path, monkeypatch):
        monkeypatch.setattr(callback, "roc_figure", lambda *_: 1 / 0)
        with pytest.warns(UserWarning, match="'roc' could not be drawn .ZeroDivisionError"):
            trainer(2, callbacks=[SANMPictures(4)]).fit(method(SANM(seed=0)), data())
        assert written(tmp_path) == ALL - {"roc"}

    @pytest.mark.parametrize("place", ["cam", "energy", "random"] if FULL else ["energy"])
    def test_every_place(self, tmp_path, place):
        options = {"place": place, "regions": "peak_and_trough", "keep_unmasked": True, "seed": 0}
        trainer(2, callbacks=[SANMPictures(3)]).fit(method(SANM(**options)), data())
        assert written(tmp_path) == ALL

    def test_other_options_of_sanm(self, tmp_path, figures):
        trainer(2, callbacks=[SANMPictures(4)]).fit(method(SANM(quality="oracle", reconstruct=False, seed=0)), data())
        assert written(tmp_path) == ALL
        assert "rebuilt" not in texts(figures["masks"])
        said = [text for text in texts(figures["masks"]).split("\n") if text.startswith("G ")]
        assert {text[:6] for text in said} <= {"G 1.00", "G 0.00"}

    def test_without_masks_there_are_no_samples(self, tmp_path):
        trainer(2, callbacks=[SANMPictures(4)]).fit(method(SANM(mask=False, seed=0)), data())
        assert written(tmp_path) == ALL - {"masks"}

    def test_sanm_off(self, tmp_path):
        trainer(2, callbacks=[SANMPictures()]).fit(method(), data())
        assert written(tmp_path) == {"losses", "roc", "transition"}

    def test_sanm_off_and_no_pass(self, tmp_path):
        trainer(2, callbacks=[SANMPictures(predict=False)]).fit(method(), data())
        assert not written(tmp_path)

    def test_true_labels_unknown(self, tmp_path, figures):
        trainer(2, callbacks=[SANMPictures(4)]).fit(method(SANM(seed=0)), Unknown(seed=3))
        assert written(tmp_path) == ALL - {"roc"}
        assert "true" not in "\n".join(map(texts, figures.values())).lower()
        assert "wrong labels" not in texts(figures["losses"]) + texts(figures["quality"])

    @pytest.mark.parametrize(
        ("kind", "sanm"),
        [(CoTeaching, True), (DivideMix, False), *([(CoTeaching, False), (DivideMix, True)] if FULL else [])],
    )
    def test_two_networks(self, tmp_path, figures, kind, sanm):
        own = {"noise_rate": 0.5} if kind is CoTeaching else {}
        module = kind(
            num_classes=4, image_size=(16, 16), network="small_cnn", network_args={"width": 4}, warmup_epochs=1,
            sanm=SANM(seed=0) if sanm else None, **own,
        )  # fmt: skip
        trainer(3, callbacks=[SANMPictures(4)]).fit(module, data())
        quality = {"quality"} if sanm or kind is DivideMix else set()
        assert written(tmp_path) == {"losses", "roc", "transition"} | quality | ({"masks"} if sanm else set())
        assert "network 2" in texts(figures["losses"])

    @pytest.mark.parametrize("channels", [1, 2, 4])
    def test_images_of_other_numbers_of_channels(self, tmp_path, channels):
        images = torch.rand(2, channels, 8, 8)
        views = Views(images, torch.eye(2), activation=torch.rand(2, 8, 8), ratio=torch.full((2,), 0.3))
        draw_views(tmp_path / "a.png", images, views, images, ["", ""])
        assert (tmp_path / "a.png").stat().st_size > 0

    def test_views_without_masks_are_refused(self, tmp_path):
        images = torch.zeros(2, 3, 8, 8)
        with pytest.raises(ValueError, match="draw them after the warm-up"):
            draw_views(tmp_path / "a.png", images, Views(images, torch.eye(2)), None, ["", ""])


@pytest.mark.usefixtures("figures")
class TestForeign:
    def test_mixin_on_a_plain_loader(self, tmp_path, figures):
        pictures = SANMPictures(6)
        trainer(3, callbacks=[pictures]).fit(Mixed(sanm=SANM(mu=0.4, seed=0)), loader())
        assert written(tmp_path) == {"masks", "losses", "quality"}
        said = texts(figures["masks"])
        assert said.count("given ") == 6
        assert "true" not in said

    @pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")
    @pytest.mark.parametrize("first", [True, False])
    def test_callback_on_the_data_of_this_package_in_either_order(self, tmp_path, first):
        pictures, sanm = SANMPictures(4), SANMCallback(SANM(mu=0.4, seed=0))
        trainer(3, callbacks=[pictures, sanm] if first else [sanm, pictures]).fit(Plain(), data())
        assert written(tmp_path) == ALL - {"transition"}
        assert sorted(pictures.history) == [1, 2, 3]

    def test_images_of_a_foreign_loader_stay_as_they_were_served(self, figures):
        trainer(2, callbacks=[SANMPictures(4)]).fit(Mixed(sanm=SANM(mu=1.0, ratio="fixed", seed=0)), loader())
        images = [axis.get_images()[0].get_array() for axis in figures["masks"].axes if axis.get_images()]
        served = {tensor.permute(1, 2, 0).numpy().tobytes() for tensor in loader().dataset.tensors[0][:8]}
        shown = [np.asarray(image) for image in images if image.ndim == 3]
        assert sum(image.tobytes() in served for image in shown) == 4

    def test_a_module_without_sanm_or_images(self, tmp_path):
        class Linear(Plain):
            def training_step(self, batch, batch_idx):
                return self.net[-1](batch[0]).square().mean()

        trainer(1, callbacks=[SANMPictures()]).fit(Linear(), DataLoader(TensorDataset(torch.rand(8, 6)), 4))
        assert not written(tmp_path)


RUNS = ("one", "two", "mixin") if FULL else ("two", "mixin")


def draw_in_two_processes(folder: Path, rank: int) -> None:
    """Train in one of two processes of ``tests/methods/two_processes.py``, and write the history."""
    options = {"num_classes": 4, "image_size": (16, 16), "network": "small_cnn", "network_args": {"width": 4}}
    modules = {
        "one": (method(SANM(seed=0)), {"datamodule": data()}),
        "two": (DivideMix(sanm=SANM(seed=0), warmup_epochs=1, **options), {"datamodule": data()}),
        "mixin": (Mixed(sanm=SANM(seed=0)), {"train_dataloaders": loader()}),
    }
    for name in RUNS:
        module, source = modules[name]
        pictures = SANMPictures(4)
        run = trainer(
            2,
            callbacks=[pictures],
            devices=2,
            strategy="ddp",
            default_root_dir=folder / name,
            use_distributed_sampler=True,
        )
        run.fit(module, **source)
        (folder / f"{name}{rank}.json").write_text(json.dumps(pictures.history))


@pytest.mark.usefixtures("figures")
class TestChoice:
    def test_is_of_the_highest_and_lowest_quality_whatever_the_truth(self, monkeypatch, figures):
        source, module = data(), method(SANM(seed=0))
        asked, serve = [], source.batch
        monkeypatch.setattr(source, "batch", lambda split, index: asked.append(index) or serve(split, index))
        trainer(3, callbacks=[SANMPictures(6)]).fit(module, source)
        quality = module.sanm.label_quality.values.mul(100).round()
        high, low = (quality[index] for index in asked)
        order = quality.sort(descending=True).values
        assert torch.equal(high, order[:3])
        assert torch.equal(low.sort(descending=True).values, order[-3:])

    def test_orders_best_and_worst_first(self):
        quality = torch.tensor([0.3, 0.9, 0.1, 0.7, 0.5])
        high, low = choose(quality, 4, seed=0)
        assert high.tolist() == [1, 3]
        assert low.tolist() == [2, 0]

    def test_never_repeats_a_sample_and_takes_what_there_is(self):
        for size in range(1, 7):
            for count in range(1, 9):
                high, low = choose(torch.linspace(0, 1, size), count, seed=0)
                chosen = high.tolist() + low.tolist()
                assert len(set(chosen)) == len(chosen) == min(size, count)

    def test_of_equal_quality_is_random_and_the_same_for_a_seed(self):
        equal = torch.ones(1000)
        assert choose(equal, 10, 1)[0].tolist() != [0, 1, 2, 3, 4]
        assert choose(equal, 10, 1)[0].tolist() == choose(equal, 10, 1)[0].tolist() != choose(equal, 10, 2)[0].tolist()

    def test_leaves_samples_out_that_were_never_seen(self, monkeypatch):
        class Half(Toy):
            def epoch_pool(self, epoch, peer=0):
                return torch.arange(0, self.num_samples, 2)

        source = Half(seed=3, noise=data().noise)
        asked, serve = [], source.batch
        monkeypatch.setattr(source, "batch", lambda split, index: asked.append(index) or serve(split, index))
        trainer(2, callbacks=[SANMPictures(6)]).fit(method(SANM(seed=0)), source)
        assert len(asked) == 2
        assert not bool((torch.cat(asked) % 2).any())


class TestHistory:
    @pytest.fixture
    def undrawn(self, monkeypatch):
        """Leave the pictures out, which take longer than the training."""
        monkeypatch.setattr(SANMPictures, "_pictures", lambda *_: iter(()))

    def test_survives_a_resume(self, undrawn):
        whole = SANMPictures()
        trainer(4, callbacks=[whole]).fit(method(SANM(seed=0)), data())
        half = trainer(2, callbacks=[SANMPictures()])
        half.fit(method(SANM(seed=0)), data())
        half.save_checkpoint("half.ckpt")
        torch.load("half.ckpt", weights_only=True)
        resumed = SANMPictures()
        trainer(4, callbacks=[resumed]).fit(method(SANM(seed=0)), data(), ckpt_path="half.ckpt")
        assert sorted(resumed.history) == [1, 2, 3, 4]
        assert resumed.history == whole.history

    @pytest.mark.usefixtures("figures")
    def test_a_run_that_is_resumed_after_its_end_draws_every_picture(self, tmp_path):
        run = trainer(2, callbacks=[SANMPictures()])
        run.fit(method(SANM(seed=0)), data())
        run.save_checkpoint("end.ckpt")
        for path in (tmp_path / "pictures").iterdir():
            path.unlink()
        trainer(2, callbacks=[SANMPictures()]).fit(method(SANM(seed=0)), data(), ckpt_path="end.ckpt")
        assert written(tmp_path) == ALL

    def test_a_second_fit_begins_anew_and_a_state_of_earlier_versions_is_read(self, undrawn):
        pictures = SANMPictures()
        for epochs in (3, 2):
            trainer(epochs, callbacks=[pictures]).fit(method(SANM(seed=0)), data())
            assert sorted(pictures.history) == list(range(1, epochs + 1))
        pictures.load_state_dict({})
        assert pictures.history == {}

    def test_holds_the_quality_that_was_in_use(self, undrawn):
        used = {}

        class Note(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                used[trainer.current_epoch] = pl_module.sanm.label_quality.quality.clone()

        pictures, source, module = SANMPictures(), data(), method(SANM(seed=0))
        trainer(3, callbacks=[pictures, Note()]).fit(module, source)
        used[3] = module.sanm.label_quality.quality
        right = source.labels == source.true_labels
        for epochs in (1, 2, 3):
            noted = pictures.history[epochs]
            assert noted["right"] == pytest.approx(float(used[epochs][right].mean()))
            assert noted["wrong"] == pytest.approx(float(used[epochs][~right].mean()))
            assert noted["quantiles"][2] == pytest.approx(float(used[epochs].median()), abs=0.05)
            assert noted["quantiles"] == sorted(noted["quantiles"])

    def test_of_an_estimate_of_the_method_ends_with_the_last_one_that_was_made(self, undrawn):
        options = {"num_classes": 4, "image_size": (16, 16), "network": "small_cnn", "network_args": {"width": 4}}
        for estimator, epochs in ((None, [1, 2]), (LabelQuality(), [1, 2, 3])):
            pictures = SANMPictures()
            module = DivideMix(sanm=SANM(seed=0, quality=estimator), warmup_epochs=1, **options)
            trainer(3, callbacks=[pictures]).fit(module, data())
            assert sorted(pictures.history) == epochs


class TestCharts:
    def test_the_posterior_is_one_half_where_it_is_said_to_be(self):
        values = torch.cat([torch.rand(200), 4 + torch.rand(100)])
        mixture = fit_mixture(values)
        places = crossings(mixture)
        assert places
        for place in places:
            around = mixture_posterior(mixture, torch.tensor([place - 0.01, place + 0.01], dtype=torch.float64))
            assert (around[0] - 0.5) * (around[1] - 0.5) < 0

    def test_components_add_up_to_the_samples(self):
        draw = torch.Generator().manual_seed(0)
        values = torch.cat([1 + 0.2 * torch.randn(3000, generator=draw), 5 + 0.5 * torch.randn(1000, generator=draw)])
        figure = histogram_figure([Losses("", "", values, fit_mixture(values), None)])
        curves = [line for line in figure.axes[0].lines if "component" in str(line.get_label())]
        areas = [float(np.trapezoid(line.get_ydata(), line.get_xdata())) for line in curves]
        width = float(values.max() - values.min()) / 50
        assert [round(area / width, -2) for area in areas] == [3000, 1000]
        assert [line.get_linestyle() for line in curves] == ["-", "--"]

    def test_equal_losses(self):
        values = torch.ones(5)
        save(histogram_figure([Losses("$", "x", values, fit_mixture(values), torch.arange(5) > 2)]), "equal.png")

    def test_roc_states_area_and_operating_point(self):
        quality, wrong = torch.tensor([0.9, 0.8, 0.3, 0.2, 0.1]), torch.tensor([False, False, False, True, True])
        said = texts(roc_figure(quality, wrong))
        assert "area 1.000" in said
        assert "100.0 % of the wrong\nand 33.3 % of the right" in said

    def test_cells_are_annotated_up_to_twenty_classes(self):
        for classes, numbers in ((3, True), (20, True), (21, False), (120, False)):
            counts = torch.eye(classes, dtype=torch.int64) * 7
            counts[1] = 0  # a class without samples
            figure = transition_figure([("Estimated", "predicted class", counts)], [f"n{i}" for i in range(classes)])
            said = texts(figure.axes[0]).split("\n")
            assert (said.count("100") == classes - 1) is numbers
            assert figure.get_size_inches()[0] <= 7
            save(figure, "transition.png")

    def test_one_epoch_without_truth(self):
        save(quality_figure({1: {"quantiles": [0.1, 0.2, 0.3, 0.4, 0.5], "right": None, "wrong": None}}, 5), "one.png")

    def test_settings_of_the_user_are_neither_used_nor_changed(self):
        import matplotlib

        with matplotlib.rc_context({"font.size": 3, "axes.facecolor": "red"}):
            before = dict(matplotlib.rcParams)
            figure = roc_figure(torch.tensor([0.9, 0.1]), torch.tensor([False, True]))
            assert dict(matplotlib.rcParams) == before
        assert figure.axes[0].get_facecolor()[:3] == (1, 1, 1)

    def test_class_names_in_any_script_or_with_formulas(self, tmp_path):
        images = torch.rand(2, 3, 8, 8)
        views = Views(images, torch.eye(2), torch.zeros(2), torch.zeros(2, 4), torch.rand(2, 8, 8))
        with drawing():
            figure = samples_figure([SampleBlock("猫 $", images, views, None, ["猫", r"\$x\$"])])
        save(figure, tmp_path / "names.png")
        draw_views(tmp_path / "views.png", images, views, images, ["$a", "$b$ c$"])
        with Image.open(tmp_path / "views.png") as picture:
            assert picture.size[0] > 300


class TestLoggers:
    @pytest.fixture
    def picture(self, tmp_path):
        figure = roc_figure(torch.tensor([0.9, 0.1]), torch.tensor([False, True]))
        save(figure, tmp_path / "roc.png")
        return figure, tmp_path / "roc.png"

    def sent(self, logger, picture):
        log_picture([logger], "pictures/roc", *picture, step=7)

    def test_weights_and_biases(self, picture):
        calls = []
        self.sent(SimpleNamespace(log_image=lambda key, images: calls.append((key, images))), picture)
        assert calls == [("pictures/roc", [str(picture[1])])]

    def test_tensorboard_figures_and_images(self, picture):
        calls = []
        board = SimpleNamespace(add_figure=lambda tag, figure, global_step, close: calls.append((tag, global_step)))
        self.sent(SimpleNamespace(experiment=board), picture)
        older = SimpleNamespace(
            add_image=lambda tag, image, global_step, dataformats: calls.append((image.shape[2], dataformats))
        )
        self.sent(SimpleNamespace(experiment=older), picture)
        assert calls == [("pictures/roc", 7), (3, "HWC")]

    def test_mlflow_and_comet(self, picture):
        calls = []
        mlflow = SimpleNamespace(log_figure=lambda run, figure, file: calls.append((run, file)))
        self.sent(SimpleNamespace(experiment=mlflow, run_id="r"), picture)
        comet = SimpleNamespace(log_figure=lambda figure_name, figure, step: calls.append((figure_name, step)))
        self.sent(SimpleNamespace(experiment=comet), picture)
        assert calls == [("r", "pictures/roc.png"), ("pictures/roc", 7)]

    def test_others_are_passed_over_and_failures_warn(self, picture):
        self.sent(SimpleNamespace(experiment=object()), picture)
        self.sent(object(), picture)

        class Broken:
            def log_image(self, key, images):
                raise RuntimeError("no network")

        with pytest.warns(UserWarning, match="Broken did not take the picture pictures/roc .RuntimeError: no network"):
            self.sent(Broken(), picture)

    def test_a_run_hands_over_every_picture(self, tmp_path):
        from lightning.pytorch.loggers import CSVLogger

        calls = []

        class Fake(CSVLogger):
            def log_image(self, key, images, **_):
                calls.append(key)
                with Image.open(images[0]) as image:
                    image.verify()

        fake = Fake(tmp_path)
        trainer(2, callbacks=[SANMPictures(4)], logger=[CSVLogger(tmp_path / "plain"), fake]).fit(
            method(SANM(seed=0)), data()
        )
        assert set(calls) == {f"pictures/{name}" for name in ALL}


def test_class_paths_of_configs_and_the_state_key_stay():
    assert importlib.import_module("sanm_lightning.pictures").SANMPictures is SANMPictures
    assert SANMPictures().state_key == "SANMPictures"
    with pytest.raises(ValueError, match="num_images >= 1"):
        SANMPictures(0)

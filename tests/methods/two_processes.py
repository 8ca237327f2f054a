"""What runs in each of the two processes of ``test_two_processes.py``: one launch, every fit.

The processes are started as torchrun starts them (its environment variables), so ``strategy="ddp"`` is all that a trainer
is told. Nobody seeds them: networks, data and streams agree because the library makes them agree. What a process has seen
goes to a file, or the error with the name of its fit.
"""

import copy
import os
import socket
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

import sanm_lightning.random_streams
import sanm_lightning.sanm.masking
import sanm_lightning.sanm.module
from sanm_lightning import SANM, SANMCallback, SANMMixin, methods
from sanm_lightning.cli import main
from sanm_lightning.models.pooled import PooledClassifier
from sanm_lightning.models.small_cnn import SmallCNN
from tests.data.test_left_out import damage, pictures
from tests.data.test_left_out import folder as image_folder
from tests.full import FULL
from tests.methods.renewing import Renewing
from tests.methods.test_every_method import METHODS, SMALL, AtStep, empty_sets_allowed
from tests.methods.toy import data, trainer
from tests.test_pictures import draw_in_two_processes

ALIKE = (
    *(
        "Mixup",
        "GCE",
        "ForwardCorrection",
        "ActiveBias",
        "PENCIL",
        "JointOptim",
        "PLC",
        "SMP",
        "CREMA",
        "Nested",
        "C2D",
    ),
)
"""Methods whose state, draws and passes are those of others; they run in ``make test-all``."""
NAMES = [name for name in (*METHODS, "Renewing") if FULL or name not in ALIKE]
UNDER = ("alone", "sanm") if FULL else ("sanm",)
CASES = {f"{name}-{under}": (name, under == "sanm") for name in NAMES for under in UNDER}
TRAIN, TEST, BATCH = 61, 21, 8  # odd: neither is a multiple of two processes
EPOCHS = 2  # of four steps
SCORING = (
    "DivideMix",
    "C2D",
    "SSR",
    "INCV",
    "REED",
)  # methods that pass over the training set at the beginning of an epoch


def stop(method: str) -> int:
    """The step of the checkpoint: in mid-epoch, or an epoch's last, where the pass over the training set is still to come."""
    return 4 if method in SCORING else 6


DDP = {"devices": 2, "strategy": "ddp"}


class Dropping(SmallCNN):
    """A network that draws from the global stream in training."""

    def __init__(self) -> None:
        super().__init__(num_classes=4, width=4)
        self.drop = nn.Dropout(0.2)
        self.dropped: list[int] = []

    def forward_features(self, x):
        features = super().forward_features(x)
        kept = self.drop(torch.ones_like(features))
        if self.drop.training:
            self.dropped.append(hash(tuple(kept[0].flatten().tolist())))
        return features * kept


def build(name: str, sanm: bool, encoder: str) -> Any:
    options = {**SMALL, **METHODS.get(name, {"warmup_epochs": 1}), "network": Dropping(), "network_args": None}
    if "pretrained" in options:
        options["pretrained"] = encoder
    return getattr(methods, name, Renewing)(sanm=SANM(mu=0.5) if sanm else None, **options)


class Note(L.Callback):
    """Note which samples this process trains on and evaluates, epoch by epoch."""

    def __init__(self) -> None:
        self.trained: dict[int, list[int]] = {}
        self.evaluated: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.trained.setdefault(trainer.current_epoch, []).extend(batch.index.tolist())

    def on_validation_start(self, trainer, pl_module):
        self.evaluated = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
        self.evaluated.extend(batch.index.tolist())


class Streams:
    """Note the name of every random stream that is opened in a step: masks, mixup, views."""

    kinds = ("mask", "mixup", "augment")

    def __init__(self) -> None:
        self.names: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in self.kinds}
        named_seed = sanm_lightning.random_streams.named_seed

        def listening(kind: str, *parts: int) -> int:
            if kind in self.names:
                self.names[kind].append(parts)
            return named_seed(kind, *parts)

        sanm_lightning.random_streams.named_seed = listening

    def since_last(self) -> dict[str, list[tuple[int, ...]]]:
        names = {kind: list(heard) for kind, heard in self.names.items()}
        for heard in self.names.values():
            heard.clear()
        return names


def state_of(module) -> dict[str, Any]:
    """Everything a module keeps, as it is now: weights, statistics, and what it remembers of each sample."""
    return copy.deepcopy(dict(module.state_dict()))


@torch.no_grad()
def accuracies(module, source) -> dict[str, float]:
    """Of the module as it is, on the whole test set, by this process alone."""
    module.eval()
    batch = source.batch("test", torch.arange(TEST))
    logits = {"test/acc": module(batch.images)}
    if isinstance(module, methods.CoTeaching):
        logits["test/acc_network2"] = module.network2(batch.images)
    return {name: (rows.argmax(1) == batch.labels).float().mean().item() for name, rows in logits.items()}


def every_method(rank: int, folder: Path, encoder: str, case: str, streams: Streams) -> dict[str, Any]:
    torch.manual_seed(1000 + rank)
    streams.since_last()
    method, sanm = CASES[case]
    tracked = not (sanm and method in SCORING)  # an evaluation would make batch statistics agree by itself
    module, source, note = build(method, sanm, encoder), unseeded(tracked), Note()
    middle, end = folder / f"{case}.middle.ckpt", folder / f"{case}.end.ckpt"
    run = trainer(EPOCHS, callbacks=[note, AtStep(stop(method), middle)], **DDP)
    run.fit(module, source)
    seen = {
        "state": state_of(module),
        "streams": streams.since_last(),
        "trained": note.trained,
        "evaluated": note.evaluated,
        "dropped": module.network.dropped,
        "logged": {name: float(value) for name, value in run.callback_metrics.items()},
        "alone": accuracies(module, source),
    }
    run.save_checkpoint(end)
    seen["tested"] = trainer(**DDP).test(module, source, verbose=False)[0]
    seen["predicted"] = torch.cat([part["index"] for part in trainer(**DDP).predict(module, source)]).tolist()

    torch.manual_seed(2000 + rank)
    again = build(method, sanm, encoder)
    trainer(EPOCHS, **DDP).fit(again, unseeded(tracked), ckpt_path=middle)
    seen["resumed"] = state_of(again)
    return seen


def unseeded(tracked: bool):
    sizes = {"num_samples": TRAIN, "num_test_samples": TEST, "batch_size": BATCH, "eval_batch_size": 4}
    source = data(seed=None, track_test=tracked, **sizes)
    assert not source._seed_is_given
    return source


# Two processes of batch b against one of batch 2 b


class Plain(PooledClassifier):
    """A network without batch statistics, which would be those of half a batch."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.reset_classifier(4)

    def forward_features(self, x):
        return torch.tanh(self.conv(x))


class FixedViews(methods.SimCLR):
    """Views that are a function of the image alone: the streams of two processes differ from that of one."""

    def views(self):
        return ("none", "mirrored")


def mirrored(images, generator):
    return images.flip(-1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


MEANS = {
    "SimCLR": (FixedViews, {"temperature": 0.1}),
    "CrossEntropy": (methods.CrossEntropy, {}),
    "CDR": (methods.CDR, {"noise_rate": 0.5}),
    "GCE": (methods.GCE, {}),
    "ELR": (methods.ELR, {}),
    "ELRPlus": (methods.ELRPlus, {"alpha": 0.0, "gamma": 0.5, "ema_ramp_steps": None}),
    "CoTeaching": (methods.CoTeaching, {"noise_rate": 0.0}),
    "MLNT": (methods.MLNT, {"num_lookaheads": 1, "meta_lr": 0.0, "ramp_steps": 0, "warmup_epochs": 1}),
}
MEAN_CASES = [(name, under) for name in MEANS for under in ("alone", "sanm") if (name, under) != ("SimCLR", "sanm")]


def negative(images, box, fill, generator, normalize):
    """A fill that is a function of the image, in place of random numbers."""
    inside = sanm_lightning.sanm.masking.inside_box(box, images.shape[-2:])
    return torch.where(inside, 1 - images, images)


def learn(name: str, under: str, batch_size: int, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a network without batch statistics, with views and masks that are functions of the image alone."""
    torch.manual_seed(0)
    kind, arguments = MEANS[name]
    if under == "sanm":  # delta 1 leaves nothing to draw for the box
        arguments = {**arguments, "sanm": SANM(mu=0.5, delta=1.0, seed=0), "warmup_epochs": 1}
    module = kind(num_classes=4, image_size=(16, 16), network=Plain(), optimizer=sgd, **arguments)
    before = {key: value.detach().clone() for key, value in module.named_parameters()}
    random_fill = sanm_lightning.sanm.module.apply_mask
    sanm_lightning.sanm.module.apply_mask = negative
    try:
        fixed = {"crop_padding": 0, "flip": False, "policies": {"mirrored": mirrored}}
        source = data(track_test=False, batch_size=batch_size, **fixed)
        trainer(3, **options).fit(module, source)
    finally:
        sanm_lightning.sanm.module.apply_mask = random_fill
    return before, {key: value.detach() for key, value in module.named_parameters()}


# SANM over modules of one's own


class Step(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Dropping()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


class Mixed(SANMMixin, Step):
    pass


def own_modules(rank: int) -> dict[str, Any]:
    """Train by the mixin and by the callback; return the module's state with SANM's."""
    seen = {}
    for name, kind in (("mixin", Mixed), ("callback", Step)):
        torch.manual_seed(3000 + rank)
        callback = SANMCallback(SANM(mu=0.5))
        module = kind()
        trainer(3, callbacks=[callback] if kind is Step else [], **DDP).fit(module, unseeded(tracked=False))
        sanm = callback.sanm if kind is Step else module.sanm
        weights = {key: value for key, value in state_of(module).items() if "running_" not in key}
        seen[name] = {"module": weights, "sanm": state_of(sanm), "hidden": sanm.last["masked_fraction"]}
    return seen


# Too little for two processes, and a loss that only one of them sees


class NaNHere(methods.CrossEntropy):
    """A loss that is not a number in the second step of one process."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx == 1 and self.global_rank == 1 else loss


class Rounded(methods.CrossEntropy):
    """State that each process computes with an error of its own."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.register_state("threshold", torch.zeros(3))
        self.register_state("found", torch.zeros(2, dtype=torch.bool))

    def begin_epoch(self):
        self.threshold = torch.tensor(1.0 + self.global_rank).expand(3)
        self.found = torch.tensor([True, self.global_rank > 0])


def state_at_the_start_of_an_epoch() -> dict[str, Any]:
    module = Rounded(**SMALL, warmup_epochs=0)
    trainer(1, **DDP).fit(module, data(num_samples=4, num_test_samples=2))
    return module.registered_state()


def edges() -> dict[str, Any]:
    """What becomes of runs at the edge: how many steps were made, and the error's sentence."""

    def run(module, **sizes) -> tuple[int, str]:
        run = trainer(2, **DDP)
        try:
            run.fit(module, data(**sizes))
        except ValueError as error:
            return run.global_step, str(error)
        return run.global_step, ""

    small = {**SMALL, "warmup_epochs": 0}
    return {
        "one training sample": run(methods.CrossEntropy(**small), num_samples=1, num_test_samples=2),
        "three training samples": run(methods.DivideMix(sanm=SANM(seed=0), **small), num_samples=3, num_test_samples=2),
        "batches of one": run(methods.SSR(k=1, **small), num_samples=2, num_test_samples=2),
        "one test sample": run(methods.CrossEntropy(**small), num_samples=4, num_test_samples=1),
        "a loss that is not a number": run(NaNHere(**small), num_samples=48),
    }


# Files that cannot be decoded


class Rows(Note):
    """Note also the path and the sum of the bytes of each image that this process trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, str, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        paths = trainer.datamodule.sample_paths()
        sums = (batch.images * 255).round().sum((1, 2, 3)).long().tolist()
        epoch = trainer.current_epoch
        self.rows += [(epoch, paths[i], pixels) for i, pixels in zip(batch.index.tolist(), sums, strict=True)]


def skipped_files(folder: Path, rank: int) -> dict[str, Any]:
    """Train on a folder of images, some of which are damaged; return the rows of this process.

    In ``make test-all``, a worker decodes them; to start workers takes longer than all the rest.
    """
    if rank == 0:
        damage(pictures(folder / "images"))
    torch.distributed.barrier()
    source = image_folder(folder / "images", on_error="skip", flip=False, resident_bytes=0, num_workers=int(FULL))
    rows = Rows()
    module = methods.CrossEntropy(**{**SMALL, "num_classes": 3}, warmup_epochs=0)
    trainer(2, callbacks=[rows], **DDP).fit(module, source)
    return {"rows": rows.rows, "evaluated": rows.evaluated, "weights": state_of(module.network)}


# The command line, as torchrun starts it

COMMAND = [
    "fit", "--model", "CrossEntropy", "--model.network", "small_cnn", "--model.network_args", "{width: 4}",
    "--model.sanm", "SANM", "--model.warmup_epochs", "1",
    "--data", "Toy", "--data.num_samples", "33", "--data.num_test_samples", "9", "--data.batch_size", "8",
    "--data.noise.kind", "symmetric_exclusive", "--data.noise.rate", "0.3",
    "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip


def command_line() -> dict[str, Any]:
    """Train by the command line, relaunch it with ``--ckpt_path last``, train the whole in one go; and predict."""
    sys.argv = ["sanm"]
    main([*COMMAND, "--trainer.max_epochs", "1", "--trainer.default_root_dir", "here"])
    torch.distributed.barrier()
    again = main([*COMMAND, "--trainer.max_epochs", "3", "--trainer.default_root_dir", "here", "--ckpt_path", "last"])
    whole = main([*COMMAND, "--trainer.max_epochs", "3", "--trainer.default_root_dir", "there"])
    main(["predict", *COMMAND[1:], "--trainer.logger", "false", "--trainer.default_root_dir", "predicted"])
    return {"again": state_of(again.model), "whole": state_of(whole.model)}


# The process


def work(rank: int, port: int, folder: Path, encoder: str, filters: list[Any]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    warnings.filters[:] = filters  # those of the test suite: warnings are errors
    warnings.filterwarnings("ignore", ".*tensorboardX.*")  # what Lightning says of its default logger
    os.chdir(folder)
    # A process that fails leaves the other one waiting: not for longer than this.
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    streams, found, doing = Streams(), {}, ""
    try:
        with empty_sets_allowed():
            for doing in CASES:
                found[doing] = every_method(rank, folder, encoder, doing, streams)
            for name, under in MEAN_CASES:
                doing = f"batch of half the size, {name}-{under}"
                found[name, under] = learn(name, under, 8, **DDP)[1]
            doing = "own modules"
            found["own modules"] = own_modules(rank)
            doing = "edges"
            found["edges"] = edges()
            doing = "registered state"
            found["registered state"] = state_at_the_start_of_an_epoch()
            doing = "pictures"
            (folder / "pictures").mkdir(exist_ok=True)
            draw_in_two_processes(folder / "pictures", rank)
            doing = "skipped files"
            found["skipped files"] = skipped_files(folder, rank)
            doing = "command line"
            found["command line"] = command_line()
    except BaseException:
        found["error"] = f"{doing}, process {rank}:\n{traceback.format_exc()}"
    torch.save(found, folder / f"process{rank}.pt")
    sys.exit(0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(folder: Path, encoder: str) -> list[dict[Any, Any]]:
    """Run both processes; return what each has seen."""
    arguments = (free_port(), folder, encoder, list(warnings.filters))
    torch.multiprocessing.spawn(work, arguments, nprocs=2)
    return [torch.load(folder / f"process{rank}.pt", weights_only=True) for rank in (0, 1)]

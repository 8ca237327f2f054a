"""State of a method is saved and moved as buffers are, and averages of the weights leave it as it is."""

import copy
from typing import NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging

from sanm_lightning import methods
from sanm_lightning.callbacks import Unaveraged, broadcast
from sanm_lightning.methods import ForwardCorrection
from sanm_lightning.methods.feature_queue import FeatureQueue
from tests.methods.test_every_method import METHODS, SMALL, fit
from tests.methods.toy import data

STATISTICS = {"mean", "std", "running_mean", "running_var", "num_batches_tracked"}
"""Names of the buffers of networks: constants, and statistics of the weights."""


def test_it_is_saved_under_its_name_and_loads_from_a_buffer_of_that_name():
    queue = FeatureQueue(3, 2, {"index": ((), torch.int64)})
    queue.enqueue(torch.ones(2, 2), index=torch.tensor([5, 7]))
    saved = queue.state_dict()
    assert {name: value.tolist() for name, value in saved.items()} == {
        "features": [[1, 1], [1, 1], [0, 0]], "valid": [True, True, False], "index": [5, 7, 0],
    }  # fmt: skip
    assert not list(queue.buffers())
    other = torch.nn.ModuleList([FeatureQueue(3, 2, {"index": ((), torch.int64)})])
    assert not any(other.load_state_dict({f"0.{name}": value for name, value in saved.items()}))
    assert other[0].index.tolist() == [5, 7, 0]


class Pair(NamedTuple):
    low: torch.Tensor
    table: torch.Tensor


def test_a_named_tuple_is_saved_by_its_fields_and_moved_as_one():
    module, other = Unaveraged(), Unaveraged()
    for part, value in ((module, 1.0), (other, 0.0)):
        part.register_state("pair", Pair(torch.tensor(value), torch.full((3,), value)))
    saved = module.double().state_dict()
    assert {name: value.tolist() for name, value in saved.items()} == {"pair_low": 1.0, "pair_table": [1.0] * 3}
    assert isinstance(module.pair, Pair)
    assert module.pair.table.dtype == torch.float64
    other.load_state_dict(saved)
    assert other.pair.table.tolist() == [1.0] * 3
    module.pair = module.pair._replace(low=torch.tensor(7.0))
    assert float(module.state_dict()["pair_low"]) == 7


def test_an_expanded_view_is_loaded_like_other_values():
    module = Unaveraged()
    module.register_state("table", torch.zeros(1).expand(3))
    module.load_state_dict({"table": torch.arange(3.0)})
    assert module.table.tolist() == [0, 1, 2]


def test_values_of_several_devices_are_broadcast_on_that_of_the_module(monkeypatch):
    class OnMeta(Unaveraged, L.LightningModule):
        device = torch.device("meta")

    module, sent = OnMeta(), []
    module.register_state("here", torch.zeros(3, device="meta"))
    module.register_state("elsewhere", torch.zeros(2))
    monkeypatch.setattr(broadcast, "several_processes", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "broadcast", lambda values, source: sent.append((values.device.type, len(values)))
    )
    broadcast.share_state(module)
    assert sent == [("meta", 5)]
    assert module.elsewhere.device.type == "meta"


def test_it_changes_its_dtype_with_the_module():
    queue = FeatureQueue(3, 2).double()
    assert (queue.features.dtype, queue.valid.dtype) == (torch.float64, torch.bool)


@pytest.mark.parametrize("name", ["ForwardCorrection", "MCorrection", "PLC", "SelCL"])
def test_estimates_keep_their_dtype_in_a_module_of_lower_precision(name):
    module = getattr(methods, name)(**SMALL)
    before = module.registered_state()
    after = module.bfloat16().registered_state()
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    assert module.network.get_classifier().weight.dtype == torch.bfloat16


def test_a_copy_has_state_of_its_own():
    queue = FeatureQueue(3, 2)
    copied = copy.deepcopy(queue)
    queue.features += 1
    assert not copied.features.any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda saved: saved.update(features=torch.zeros(4, 2)), r"expected features of shape \(3, 2\), got \(4, 2\)"),
        (lambda saved: saved.pop("valid"), 'Missing key.* "valid"'),
        (lambda saved: saved.update(other=torch.zeros(1)), 'Unexpected key.* "other"'),
    ],
)
def test_other_state_does_not_load(change, sentence):
    queue = FeatureQueue(3, 2)
    saved = dict(queue.state_dict())
    change(saved)
    with pytest.raises(RuntimeError, match=sentence):
        queue.load_state_dict(saved)
    queue.load_state_dict({name: value for name, value in saved.items() if name == "valid"}, strict=False)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("C2D", "REED")])
def test_buffers_of_methods_are_those_of_their_networks(name):
    module = getattr(methods, name)(**SMALL, **METHODS[name])
    owned = {
        key for key, _ in module.named_buffers() if key.split(".")[-1] not in STATISTICS and key in module.state_dict()
    }
    assert not owned


def test_an_average_of_the_weights_leaves_it(tmp_path):
    runs, found = [], []
    for callbacks in ([], [WeightAveraging()]):
        torch.manual_seed(0)
        module = ForwardCorrection(**SMALL, warmup_epochs=1)
        runs.append(fit(module, data(), callbacks=callbacks))
        runs[-1].save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
        found += [module.transition, saved["state_dict"]["transition"]]
    assert all(torch.equal(transition, found[0]) for transition in found)
    assert not torch.equal(found[0], torch.eye(4))
    weights = [run.lightning_module.network.network.fc.weight for run in runs]
    assert not torch.equal(*weights)
    assert isinstance(module, Unaveraged)

"""Checkpoints of the version before per-sample state was declared (2888072) load; other draws are refused in a sentence."""

import pytest
import torch

from sanm_lightning import SANM, methods
from sanm_lightning.methods.dividemix import Division
from sanm_lightning.per_sample import LabelStore
from tests.methods.test_every_method import METHODS, SMALL, fit
from tests.methods.toy import data


def earlier(checkpoint: dict, name: str) -> dict:
    """Write a checkpoint as the earlier version did."""
    state = checkpoint["state_dict"]
    for key, value in list(state.items()):
        tables = value.get("tables") if isinstance(value, dict) else None
        if key.startswith("division."):
            state[key] = {"history": tables["rows"].permute(1, 2, 0), "clean": tables["clean"].T}
        elif key.startswith(("targets.", "banks.")):
            value = tables["value"]
            state[key] = {"value": value, "touched": torch.zeros(len(value)), "start": value.clone()}
        elif tables is not None:
            state[key] = dict(tables)
        elif key.startswith("teachers."):
            del state[key]
            if not key.endswith("_extra_state"):
                state[key.replace(".module.", ".", 1)] = value
            else:
                checkpoint["method"]["averaged"] = value["steps"]
    return checkpoint


def build(name: str, **options):
    torch.manual_seed(0)
    return getattr(methods, name)(**{**SMALL, **METHODS[name], **options}, sanm=SANM(mu=0.5, seed=0))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("C2D", "REED")])
def test_they_load_with_all_that_they_held(name, tmp_path):
    module = build(name)
    fit(module, epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    torch.save(earlier(torch.load(tmp_path / "a.ckpt", weights_only=True), name), tmp_path / "old.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "old.ckpt", weights_only=True)
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(module.eval()(images), loaded.eval()(images))
    if module.label_quality() is not None:
        torch.testing.assert_close(module.label_quality(), loaded.label_quality())
    for one, other in zip(module.sanms, loaded.sanms, strict=True):
        assert torch.equal(one.label_quality.bank.value, other.label_quality.bank.value)
    if name == "ELRPlus":
        assert [teacher.steps for teacher in loaded.teachers] == [8, 8]
        assert torch.equal(loaded.banks[0].value, module.banks[0].value)
    if name == "ELR":
        assert torch.equal(loaded.targets.value, module.targets.value)


def test_a_history_of_several_epochs_keeps_the_last_ones():
    division, history = Division(2), torch.rand(3, 2, 5)
    division.set_extra_state({"history": history, "clean": torch.rand(2, 5)})
    torch.testing.assert_close(division.mean(), history[1:].mean(0).T)
    assert division.done


def test_a_selection_that_was_never_made_changes_nothing():
    store = LabelStore(dist_reduce_fx=None)
    store.reset(4, torch.arange(4))
    empty = torch.zeros(0)
    store.set_extra_state(dict.fromkeys(("labels", "selected", "quality", "given_quality"), empty))
    assert store.labels.tolist() == [0, 1, 2, 3]
    assert not store.filled


def test_a_run_whose_labels_an_earlier_version_drew_is_refused_in_a_sentence(tmp_path):
    module = build("CrossEntropy")
    fit(module, epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    old = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for state in old.values():
        if isinstance(state, dict) and "draws" in state:
            del state["draws"]
            state["labels"] += 1
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"used other random streams .*; resume with that version, or start a new run"):
        fit(build("CrossEntropy"), data(), epochs=3, ckpt_path=tmp_path / "old.ckpt")

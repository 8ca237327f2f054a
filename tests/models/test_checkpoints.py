"""Weights from other people's checkpoints: wrappings, prefixes, reports, refusals."""

import pytest
import torch

from sanm_lightning.models import create_network, load_weights


def network(seed: int = 0, width: int = 4):
    torch.manual_seed(seed)
    return create_network("preact_resnet18", 10, width=width)


def same_backbone(one, other) -> bool:
    a, b = one.network.state_dict(), other.network.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a if not key.startswith("fc."))


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.encoder.", "network.network.", "backbone."])
@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_usual_forms_are_seen_through(tmp_path, prefix, wrapping):
    source, target = network(1), network(2)
    weights = {prefix + key: value for key, value in source.network.state_dict().items()}
    weights["projection.0.weight"] = torch.rand(3, 3)
    torch.save({wrapping: weights, "epoch": 3} if wrapping else weights, tmp_path / "file.pt")
    head = target.network.fc.weight.clone()
    report = load_weights(target, tmp_path / "file.pt")
    assert same_backbone(source, target)
    assert torch.equal(target.network.fc.weight, head), "the classifier stays"
    assert report.missing == []
    assert "projection.0.weight" in report.unexpected
    assert len(report.matched) == len([k for k in target.network.state_dict() if not k.startswith("fc.")])


def test_statistics_of_the_images_stay(tmp_path):
    source = create_network("preact_resnet18", 10, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), width=4)
    torch.save(source.state_dict(), tmp_path / "file.pt")
    target = network(2)
    load_weights(target, tmp_path / "file.pt")
    assert target.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert same_backbone(source, target)


def test_what_is_missing_is_listed(tmp_path):
    weights = network(1).network.state_dict()
    gone = "stages.0.conv1.weight"
    del weights[gone]
    torch.save(weights, tmp_path / "file.pt")
    assert list(load_weights(network(2), tmp_path / "file.pt").missing) == [f"network.{gone}"]


def test_another_width_is_refused(tmp_path):
    torch.save(network(1, width=8).state_dict(), tmp_path / "file.pt")
    with pytest.raises(ValueError, match="tensors that match in name and shape"):
        load_weights(network(2), tmp_path / "file.pt")


def test_a_missing_file_a_broken_one_and_one_with_code(tmp_path):
    with pytest.raises(ValueError, match="which does not exist"):
        load_weights(network(), tmp_path / "none.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be loaded as such"):
        load_weights(network(), tmp_path / "broken.pt")
    torch.save({"state_dict": network(), "call": print}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="expected a file of tensors and built-in types"):
        load_weights(network(), tmp_path / "code.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="0 of"):
        load_weights(network(), tmp_path / "empty.pt")

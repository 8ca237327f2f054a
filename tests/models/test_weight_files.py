"""Pre-trained weights from local files and installed packages."""

import re
from pathlib import Path

import pytest
import timm
import torch

from sanm_lightning import CrossEntropy
from sanm_lightning.models import create_network, load_pretrained, weight_files
from sanm_lightning.models.weight_files import packaged_weights

NAME = "test_resnet"


@pytest.fixture
def source():
    torch.manual_seed(1)
    return timm.create_model(NAME)


@pytest.fixture
def packaged(monkeypatch, source, tmp_path) -> Path:
    """A package with weights under the names of another implementation."""
    path = tmp_path / "weights.pth"
    torch.save({f"other.{i}": part for i, part in enumerate(source.state_dict().values())}, path)
    monkeypatch.setattr(weight_files, "packaged_weights", lambda name: path if name == NAME else None)
    return path


def from_file(path: Path, name: str = NAME, num_classes: int = 7):
    return create_network(name, num_classes, pretrained=True, pretrained_cfg_overlay={"file": str(path)})


def body(network) -> dict[str, torch.Tensor]:
    return {key: part for key, part in network.state_dict().items() if not key.startswith("fc.")}


class TestPackaged:
    def test_are_loaded_by_order_with_a_new_classifier_and_the_statistics_of_the_network(self, packaged, source):
        made = create_network(NAME, 7, pretrained=True)
        for key, part in body(source).items():
            assert torch.equal(made.network.state_dict()[key], part)
        assert made.network.fc.weight.shape[0] == 7
        assert float(made.network.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.2)
        assert not bool(made.network.fc.bias.any())
        assert made.mean.flatten().tolist() == pytest.approx(source.pretrained_cfg["mean"])

    def test_need_no_connection(self, packaged, monkeypatch):
        monkeypatch.setattr("socket.socket", None)
        create_network(NAME, 7, pretrained=True)

    def test_are_not_needed_to_load_a_checkpoint(self, packaged, monkeypatch):
        module = CrossEntropy(7, network=NAME, network_args={"pretrained": True})
        packaged.unlink()
        again = CrossEntropy(**{**module.hparams, "sanm": None})
        again.load_state_dict(module.state_dict())
        for key, part in module.network.state_dict().items():
            assert torch.equal(again.network.state_dict()[key], part)

    @pytest.mark.skipif(packaged_weights("tf_efficientnet_lite0") is None, reason="the extra 'pretrained' is missing")
    def test_of_the_extra_give_the_features_of_the_audit(self):
        images = torch.rand(2, 3, 64, 64)
        made = create_network("tf_efficientnet_lite0", 7, pretrained=True).eval()
        frozen = load_pretrained("tf_efficientnet_lite0")
        with torch.no_grad():
            ours, theirs = (net.forward_head(net.forward_features(images), pre_logits=True) for net in (made, frozen))
        assert torch.equal(ours, theirs)


class TestFile:
    def test_of_the_network_has_precedence_over_a_package(self, packaged, tmp_path):
        other = timm.create_model(NAME)
        torch.save(other.state_dict(), tmp_path / "own.pth")
        made = from_file(tmp_path / "own.pth")
        for key, part in body(other).items():
            assert torch.equal(made.network.state_dict()[key], part)

    def test_with_a_classifier_of_the_same_size_keeps_it(self, source, tmp_path):
        torch.save(source.state_dict(), tmp_path / "own.pth")
        made = from_file(tmp_path / "own.pth", num_classes=1000)
        assert torch.equal(made.network.fc.weight, source.fc.weight)

    def test_without_a_matching_tensor_is_refused(self, tmp_path):
        torch.save({"a.weight": torch.ones(3, 3), "b.weight": torch.ones(2)}, tmp_path / "own.pth")
        sentence = re.escape(
            f"expected weights for {NAME!r} in {str(tmp_path / 'own.pth')!r}, got a file without a matching"
        )
        with pytest.raises(ValueError, match=sentence):
            from_file(tmp_path / "own.pth")

    def test_of_other_shapes_is_refused(self, source, tmp_path):
        state = source.state_dict()
        torch.save({**state, "layer1.0.conv1.weight": state["layer1.0.conv1.weight"][:1]}, tmp_path / "own.pth")
        with pytest.raises(ValueError, match=r"expected weights for 'test_resnet' in .*does not fit \(size mismatch"):
            from_file(tmp_path / "own.pth")

    def test_that_does_not_exist_is_refused(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"expected a weight file in .*none.pth', got no such file; check the path"
        ):
            from_file(tmp_path / "none.pth")

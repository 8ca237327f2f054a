"""Weights from other people's checkpoints: wrappings, prefixes, reports, refusals."""

import pytest
import timm
import torch
from torch import nn

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


def test_what_is_missing_is_refused_or_listed_where_that_is_asked_for(tmp_path):
    weights = network(1).network.state_dict()
    gone = "stages.0.conv1.weight"
    del weights[gone]
    torch.save(weights, tmp_path / "file.pt")
    target = network(2)
    before = target.network.stem[0].weight.clone()
    with pytest.raises(ValueError, match=rf"in the network, not in the file: network.{gone}\)"):
        load_weights(target, tmp_path / "file.pt")
    assert torch.equal(target.network.stem[0].weight, before), "a refused file changes nothing"
    assert load_weights(target, tmp_path / "file.pt", allow_missing=True).missing == [f"network.{gone}"]
    assert torch.equal(target.network.stem[0].weight, weights["stem.0.weight"])


@pytest.mark.parametrize(
    ("name", "head"), [("resnet18", "fc"), ("convnext_atto", "head.fc"), ("vit_tiny_patch16_224", "head")]
)
def test_the_classifier_of_a_network_of_timm_is_named_and_the_rest_is_loaded(tmp_path, name, head):
    torch.manual_seed(0)
    source, target = (timm.create_model(name, num_classes=classes) for classes in (5, 3))
    for part in source.parameters():
        torch.nn.init.normal_(part)
    torch.save(source.state_dict(), tmp_path / "file.pt")
    report = load_weights(target, tmp_path / "file.pt")
    assert report.classifier == [f"{head}.weight", f"{head}.bias"]
    held = target.state_dict()
    assert all(
        torch.equal(held[key], part) for key, part in source.state_dict().items() if key not in report.classifier
    )


def test_the_classifier_is_loaded_where_that_is_asked_for_and_its_shape_is_the_same(tmp_path):
    source, target = network(1), network(2)
    torch.save(source.state_dict(), tmp_path / "file.pt")
    assert load_weights(target, tmp_path / "file.pt", classifier=True).classifier == []
    assert torch.equal(target.network.fc.weight, source.network.fc.weight)
    other = create_network("preact_resnet18", 7, width=4)
    assert load_weights(other, tmp_path / "file.pt", classifier=True).classifier == [
        "network.fc.weight",
        "network.fc.bias",
    ]
    assert same_backbone(source, other)


class TestReleasedCodes:
    """Names of the released codes, written down here from their networks."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.bn1 = nn.BatchNorm2d(inputs)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.shortcut = nn.Sequential()
            if stride > 1:
                self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

        def forward(self, x):
            active = self.bn1(x).relu()
            return self.conv2(self.bn2(self.conv1(active)).relu()) + self.shortcut(active)

    class PreAct(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
            inputs = width
            for stage in range(4):
                outputs, stride = width << stage, 2 if stage else 1
                blocks = TestReleasedCodes.Block(inputs, outputs, stride), TestReleasedCodes.Block(outputs, outputs, 1)
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
                inputs = outputs
            self.linear = nn.Linear(inputs, 10)

        def forward(self, x):
            x = self.bn1(self.conv1(x)).relu()
            return self.linear(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))

    def released(self, path, prefix=""):
        torch.manual_seed(3)
        made = self.PreAct(4)
        made(torch.rand(8, 3, 16, 16))  # statistics of batch norm
        torch.save({prefix + key: part for key, part in made.state_dict().items()}, path)
        return made.eval()

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_a_preact_resnet_gives_the_same_logits(self, tmp_path, prefix):
        made = self.released(tmp_path / "file.pt", prefix)
        target = timm.create_model("preact_resnet18_dividemix", width=4).eval()
        assert load_weights(target, tmp_path / "file.pt", classifier=True).classifier == []
        images = torch.rand(4, 3, 16, 16)
        torch.testing.assert_close(target(images), made(images))

    def test_a_preact_resnet_is_refused_by_the_form_with_other_shortcuts(self, tmp_path):
        self.released(tmp_path / "file.pt")
        with pytest.raises(ValueError, match="use preact_resnet18_dividemix"):
            load_weights(network(), tmp_path / "file.pt")

    def test_an_encoder_of_c2d_fills_the_resnet_for_cifar(self, tmp_path):
        torch.manual_seed(4)
        source, target = (timm.create_model("resnet18_cifar", channels=(4, 8, 8, 16)) for _ in range(2))
        weights = {
            f"encoder.module.{key.replace('downsample', 'shortcut')}": part
            for key, part in source.state_dict().items()
            if not key.startswith("fc.")
        }
        torch.save({"model": {**weights, "head.0.weight": torch.rand(4, 16)}, "epoch": 3}, tmp_path / "file.pt")
        report = load_weights(target, tmp_path / "file.pt")
        assert (report.missing, report.unexpected, report.classifier) == (
            [],
            ["head.0.weight"],
            ["fc.weight", "fc.bias"],
        )
        images = torch.rand(2, 3, 16, 16)
        torch.testing.assert_close(target.eval().forward_features(images), source.eval().forward_features(images))

    def test_an_encoder_of_c2d_is_refused_by_a_network_with_another_stem(self, tmp_path):
        source = timm.create_model("resnet18_cifar")
        weights = {
            f"encoder.{key.replace('downsample', 'shortcut')}": part for key, part in source.state_dict().items()
        }
        torch.save(weights, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=r"not in the file: network.conv1.weight\)"):
            load_weights(create_network("resnet18", 10), tmp_path / "file.pt")


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

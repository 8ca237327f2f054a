"""``sanm export``: what is written loads without this package, and predicts what the method predicts."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config

from sanm_lightning.commands.export import export, main
from sanm_lightning.models import create_network, load_weights
from tests.commands.conftest import OPTIONS
from tests.full import FULL

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TINY = {"network": "test_resnet", "network_args": None}


@torch.no_grad()
def probabilities(module, images=IMAGES):
    return module(images).softmax(1)


def close(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


OWN_NETWORKS = (
    "CrossEntropy",
    "CoTeaching",
    "ELRPlus",
    "DivideMix",
    "IEG",
    "SSR",
    "Nested",
    "NestedCoTeaching",
    "REED",
    "RRL",
    "SimCLR",
)
"""Methods whose networks for prediction differ in number, or in what is taken from them; the others in ``make test-all``."""


@pytest.mark.parametrize("name", sorted(OPTIONS if FULL else OWN_NETWORKS))
def test_every_method_as_safetensors_and_as_a_whole_predictor(name, trained, tmp_path, capsys):
    module, path = trained(name)
    formats = ["safetensors"] if name == "SimCLR" else ["safetensors", "torch"]
    assert export(str(path), str(tmp_path / "out"), formats) == 0
    assert name in capsys.readouterr().out
    for number, network in enumerate(module.prediction_networks):
        folder = tmp_path / "out" / ("network", "network2")[number]
        config = json.loads((folder / "config.json").read_text())
        assert config["library"] == "sanm_lightning"
        again = create_network(config["architecture"], config["num_classes"], **config["model_args"])
        again.load_state_dict(load_file(folder / "model.safetensors"))
        again.eval()
        with torch.no_grad():
            features = network.forward_head(network.forward_features(IMAGES), pre_logits=True)
            assert torch.equal(again.forward_head(again.forward_features(IMAGES), pre_logits=True), features)
            if name == "SimCLR":
                assert config["num_classes"] == 0
                assert not any(".fc." in key for key in again.state_dict())
            else:
                assert config["label_names"] == ["=cat", 'do"g', "a,b", "käse"]
                assert torch.equal(again(IMAGES), network(IMAGES))
    assert len(list((tmp_path / "out").glob("network*"))) == len(module.prediction_networks)
    if "torch" in formats:
        program = torch.export.load(tmp_path / "out" / "predictor.pt2")
        for size in (1, 2, 5):
            close(program.module()(IMAGES[:size]), probabilities(module, IMAGES[:size]))
        held = {key.split(".")[1] for key in program.state_dict}
        own = {"IEG": {"average"}, "Nested": {"dropouts"}, "NestedCoTeaching": {"dropouts"}}  # of the prediction
        assert held <= {"network", "network2"} | own.get(name, set()), "what only a training needs is left out"


def test_a_network_of_timm_loads_with_timm_alone(trained, tmp_path):
    module, path = trained("ELRPlus", **TINY, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    export(str(path), str(tmp_path / "out"))
    for number, network in enumerate(module.networks):
        folder = tmp_path / "out" / ("network", "network2")[number]
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        data = resolve_data_config({}, model=again)
        assert tuple(data["input_size"]) == (3, 16, 16)
        assert again.pretrained_cfg["label_names"] == ["=cat", 'do"g', "a,b", "käse"]
        mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            close(again((IMAGES - mean) / std), network(IMAGES))
        by_hand = timm.create_model("test_resnet", num_classes=4, checkpoint_path=folder / "model.safetensors")
        assert all(torch.equal(part, by_hand.state_dict()[key]) for key, part in again.state_dict().items())


def test_a_network_of_this_package_on_a_class_of_timm_is_not_loaded_by_timm_alone(trained, tmp_path):
    small = {"network": "resnet18_cifar", "network_args": {"channels": [4, 4, 4, 8]}}
    module, path = trained("CrossEntropy", **small)
    export(str(path), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "network" / "config.json").read_text())
    assert config["library"] == "sanm_lightning"
    again = create_network(config["architecture"], config["num_classes"], **config["model_args"]).eval()
    again.load_state_dict(load_file(tmp_path / "out" / "network" / "model.safetensors"))
    with torch.no_grad():
        close(again(IMAGES), module.network(IMAGES))


def test_an_encoder_of_timm_has_no_classifier(trained, tmp_path):
    module, path = trained("SimCLR", **TINY)
    export(str(path), str(tmp_path / "out"))
    again = timm.create_model(f"local-dir:{tmp_path / 'out' / 'network'}", pretrained=True).eval()
    with torch.no_grad():
        close(again((IMAGES - 0.5) / 0.25), module.network.forward_head(module.network.forward_features(IMAGES), True))


def test_a_whole_predictor_of_bytes(trained, tmp_path):
    module, path = trained("DivideMix")
    export(str(path), str(tmp_path / "out"), ["torch"], input_dtype="uint8")
    images = (IMAGES * 255).to(torch.uint8)
    program = torch.export.load(tmp_path / "out" / "predictor.pt2").module()
    close(program(images), probabilities(module, images / 255))
    said = json.loads((tmp_path / "out" / "predictor.json").read_text())
    assert said["input"]["dtype"] == "uint8"
    assert said["input"]["range"] == [0, 255]


@pytest.mark.parametrize("name", ["CrossEntropy", "DivideMix"])
def test_onnx(name, trained, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    module, path = trained(name)
    export(str(path), str(tmp_path / "out"), ["onnx"])
    session = runtime.InferenceSession(str(tmp_path / "out" / "predictor.onnx"))
    for size in (1, 2, 5):
        found = session.run(["probabilities"], {"images": IMAGES[:size].numpy()})[0]
        close(torch.from_numpy(found), probabilities(module, IMAGES[:size]))


def test_onnx_without_its_packages_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ValueError, match=r"expected the package onnx .* install the extra 'onnx'"):
        export(str(trained("CrossEntropy")[1]), str(tmp_path / "out"), ["onnx"])
    assert not (tmp_path / "out").exists()


class TestBadInput:
    def test_a_folder_with_files_stays_as_it_is(self, trained, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        with pytest.raises(FileExistsError, match=r"expected a new folder .* got a folder with files"):
            export(str(trained("CrossEntropy")[1]), str(tmp_path / "out"))
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]

    def test_the_current_folder_is_refused(self, trained, tmp_path):
        with pytest.raises(ValueError, match=r"expected the name of a new folder, got '\.'; use another --out"):
            export(str(trained("CrossEntropy")[1]), ".")
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_folder_is_taken(self, trained, tmp_path):
        (tmp_path / "out").mkdir()
        assert main(["--ckpt_path", str(trained("CrossEntropy")[1]), "--out", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "network" / "model.safetensors").exists()

    def test_an_encoder_is_no_predictor(self, trained, tmp_path):
        with pytest.raises(ValueError, match="expected a method with a trained classifier, got SimCLR"):
            export(str(trained("SimCLR")[1]), str(tmp_path / "out"), ["safetensors", "torch"])
        assert list(tmp_path.iterdir()) == []

    def test_a_failure_leaves_nothing(self, trained, tmp_path, monkeypatch):
        def broken(*_, **__):
            raise RuntimeError("no such operator\nand more")

        monkeypatch.setattr(torch.export, "export", broken)
        with pytest.raises(ValueError, match=r"can trace .* RuntimeError: no such operator; export it as safetensors"):
            export(str(trained("CrossEntropy")[1]), str(tmp_path / "out"), ["safetensors", "torch"])
        assert list(tmp_path.iterdir()) == []

    def test_unknown_formats(self, trained, tmp_path):
        with pytest.raises(ValueError, match="expected formats among safetensors, torch, onnx"):
            export(str(trained("CrossEntropy")[1]), str(tmp_path / "out"), ["tflite"])


def test_a_classifier_that_load_weights_leaves_alone_is_named(trained):
    target = timm.create_model("test_resnet", num_classes=4)
    report = load_weights(target, trained("CrossEntropy", **TINY)[1])
    assert report.missing == []
    assert report.classifier == ["fc.weight", "fc.bias"]

"""Pre-trained weights without a network connection."""

import socket

import pytest
import timm
import torch
from huggingface_hub import constants

from sanm_lightning.models import create_network, load_pretrained


@pytest.fixture
def _no_network(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_network")
def test_are_refused_at_once_with_the_network_and_a_remedy(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a retry"))
    with pytest.raises(
        ValueError, match=r"expected pre-trained weights for 'resnet18', got none .*\{file: FILE\}.*resnet18"
    ):
        create_network("resnet18", 10, pretrained=True)
    with pytest.raises(ValueError, match=r"expected pre-trained weights for 'resnet18', got none .*set checkpoint"):
        load_pretrained("resnet18")
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("_no_network")
def test_are_read_from_the_file_of_the_remedy(tmp_path):
    source = timm.create_model("resnet18")
    torch.save(source.state_dict(), tmp_path / "file.pth")
    overlay = {"file": str(tmp_path / "file.pth")}
    made = create_network("resnet18", 10, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(made.network.conv1.weight, source.conv1.weight)

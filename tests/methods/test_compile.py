"""Compiled networks: the same training, the same checkpoints, nothing left on the module."""

import copy

import pytest
import torch

from sanm_lightning import SANM, CrossEntropy, methods
from tests.methods.toy import data, same, trainer

SMALL = {
    "network": "small_cnn",
    "network_args": {"width": 4},
    "num_classes": 4,
    "image_size": (16, 16),
    "warmup_epochs": 1,
}


def module(name: str, compiled: bool | str) -> methods.NoisyLabelModule:
    torch.manual_seed(0)
    return getattr(methods, name)(**SMALL, sanm=SANM(mu=0.5, seed=0), compile_network=compiled)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at what it compiles
@pytest.mark.parametrize("name", ["CrossEntropy", "ELRPlus"])
def test_a_compiled_network_learns_the_same(name, tmp_path, monkeypatch):
    ran = []
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda half, **kw: ran.append(half.__name__) or compiled(half, **kw))
    plain, fast = module(name, False), module(name, "aot_eager")
    trainer(2).fit(plain, data())
    assert not ran
    run = trainer(2)
    run.fit(fast, data())
    assert ran == ["forward_features", "forward_head"] * len(fast.networks)
    for key, value in plain.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(fast.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    run.save_checkpoint(tmp_path / "compiled.ckpt")
    again = type(fast).load_from_checkpoint(tmp_path / "compiled.ckpt", weights_only=True)
    assert same(again.network, fast.network)
    # nothing is left: a copy runs its own weights
    twin = copy.deepcopy(fast).eval()
    with torch.no_grad():
        for parameter in twin.network.parameters():
            parameter.zero_()
        assert not twin.network(torch.rand(2, 3, 16, 16)).any()


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"compile_network true, false or one of .*inductor.*, got 'fast'"):
        CrossEntropy(4, compile_network="fast")

"""Which label quality counts as that of the training."""

from types import SimpleNamespace

import pytest
import torch

from sanm_lightning.run.record import label_quality_auc
from sanm_lightning.sanm.estimate import estimated_quality, own_estimate

RIGHT = torch.tensor([1.0, 1.0, 0.0, 0.0])


def sanm(values, quality="estimated"):
    return SimpleNamespace(enabled=True, quality=quality, label_quality=SimpleNamespace(values=values))


def module(own, *sanms):
    return SimpleNamespace(sanms=list(sanms), sanm=sanms[0] if sanms else None, label_quality=lambda: own)


def auc(part):
    data = SimpleNamespace(true_labels=torch.zeros(4, dtype=torch.int64), labels=torch.tensor([0, 0, 1, 1]))
    return label_quality_auc(SimpleNamespace(datamodule=data, callbacks=[]), part)


@pytest.mark.parametrize(
    ("own", "quality", "expected"),
    [(1 - RIGHT, "given", 1.0), (1 - RIGHT, "estimated", 0.0), (None, "estimated", 1.0), (None, "oracle", 1.0)],
)
def test_a_configured_estimator_then_the_method_then_the_mixture(own, quality, expected):
    part = module(own, sanm(RIGHT, quality))
    assert auc(part) == expected
    assert (own_estimate(part, part.sanms) is own) == (quality != "given" or own is None)


def test_two_networks_are_averaged():
    part = module(None, sanm(torch.tensor([1.0, 0.0, 0.5, 0.5])), sanm(torch.tensor([0.0, 1.0, 0.1, 0.3])))
    torch.testing.assert_close(estimated_quality(part, part.sanms), torch.tensor([0.5, 0.5, 0.3, 0.4]))
    assert auc(part) == 1.0


def test_nothing_is_known_without_an_estimate():
    assert estimated_quality(module(None), []) is None
    assert estimated_quality(module(None, sanm(None)), [sanm(None)]) is None
    assert auc(module(None)) is None


def test_the_result_is_no_view_of_the_estimate():
    values = RIGHT.clone()
    estimated_quality(module(values), []).zero_()
    assert torch.equal(values, RIGHT)

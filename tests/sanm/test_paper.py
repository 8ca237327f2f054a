"""``configs/sanm/paper.yaml`` computes the equations of the paper, in loops over single images and classes."""

import math

import pytest
import torch
import yaml

from sanm_lightning.command_line.config_paths import packaged
from sanm_lightning.models import create_network
from sanm_lightning.sanm import SANM
from sanm_lightning.sanm.activation import upsample

CONFIGS = packaged() / "configs"
PAPER = yaml.safe_load((CONFIGS / "sanm" / "paper.yaml").read_text())["model"]["init_args"]["sanm"]["init_args"]
SIZE, CLASSES = 32, 4
QUALITY = (0.0, 0.25, 0.5, 0.75, 1.0, 0.1)


def check_equations(**other) -> None:
    """Assert Eq. 1 to 5, 7, 9 and 10 for the options of the file, some of them replaced."""
    torch.manual_seed(0)
    options = {**PAPER, **other}
    network, sanm = create_network("small_cnn", CLASSES, width=4), SANM(**options, seed=0)
    sanm.build(network, (SIZE, SIZE))
    images, quality = torch.rand(6, 3, SIZE, SIZE), torch.tensor(QUALITY)
    targets = torch.eye(CLASSES)[torch.arange(6) % CLASSES]
    views = sanm(network, images, targets, quality)
    assert len(views.images) == len(images)
    weight = network.get_classifier().weight.detach()
    for i, label in enumerate(targets.argmax(1).tolist()):
        activation = (weight[views.logits[i].argmax(), :, None, None] * views.features[i]).sum(0)  # Eq. 1
        ratio = PAPER["mu"] * (1 - QUALITY[i])  # Eq. 2
        row, column = divmod(int(upsample(activation[None], (SIZE, SIZE)).argmax()), SIZE)
        up, down, left, right = views.box[i].tolist()
        check_box((up, down), (left, right), row, column, ratio)
        check_pixels(images[i], views.images[i], (up, down), (left, right), ratio)
        for j in range(CLASSES):  # Eq. 7
            expected = (1 - ratio if j == label else 0.0) + ratio / CLASSES
            assert float(views.targets[i, j]) == pytest.approx(expected, abs=1e-6)
    features = network.forward_features(views.images)
    expected = PAPER["beta"] * (sanm.decoder(features) - images).square().mean()  # Eq. 9 and 10, as a mean over pixels
    torch.testing.assert_close(sanm.reconstruction(features, images, views), expected)


def check_box(rows, columns, row: int, column: int, ratio: float) -> None:
    """Eq. 3 and 4: a box of the area around the maximum, with an aspect of at least delta and at most 1 / delta, clipped."""
    if ratio == 0:
        assert rows[0] == rows[1] and columns[0] == columns[1]
        return
    half_height = max(row - rows[0], rows[1] - row)  # one of the edges is not clipped
    aspect = 4 * half_height**2 / (ratio * SIZE**2)
    assert PAPER["delta"] - 1e-4 <= aspect <= 1 / PAPER["delta"] + 1e-4
    half_width = math.sqrt(ratio * SIZE**2 / (4 * aspect))
    for (low, high), center, half in ((rows, row, half_height), (columns, column, half_width)):
        assert low == pytest.approx(max(center - half, 0), abs=1e-3)
        assert high == pytest.approx(min(center + half, SIZE), abs=1e-3)


def check_pixels(before: torch.Tensor, after: torch.Tensor, rows, columns, ratio: float) -> None:
    """Eq. 5: pixels in the box are drawn from U(0, 1) one by one, the others are unchanged."""
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    for m in range(SIZE):
        for n in range(SIZE):
            inside[m, n] = ratio > 0 and rows[0] <= m <= rows[1] and columns[0] <= n <= columns[1]
    assert torch.equal(before[:, ~inside], after[:, ~inside])
    if ratio > 0:
        drawn = after[:, inside]
        assert ((drawn >= 0) & (drawn < 1)).all() and (drawn != before[:, inside]).float().mean() > 0.9
        assert drawn.unique().numel() > 0.9 * drawn.numel()


def test_the_options_of_the_file_give_the_equations():
    check_equations()


@pytest.mark.parametrize(
    "other",
    [
        {"mu": 0.2}, {"delta": 0.1}, {"beta": 0.04}, {"mask": False}, {"labels": False}, {"reconstruct": False},
        {"place": "random"}, {"place": "energy"}, {"ratio": "fixed"}, {"ratio": "two_level"}, {"fill": "channel"},
        {"anchor": "corner"}, {"anchor": "inside"}, {"regions": "peak_and_trough"}, {"area": 0.5}, {"spread": "others"},
        {"keep_unmasked": True},
    ],
    ids=str,
)  # fmt: skip
def test_another_option_does_not(other):
    with pytest.raises((AssertionError, TypeError)):
        check_equations(**other)


def test_the_file_states_every_option_but_those_that_the_paper_leaves_open():
    assert set(SANM().options) - set(PAPER) == {"ratio_range", "batch_statistics", "warmup_epochs", "seed"}


def test_the_documented_choice_differs_from_the_paper_in_nothing_yet():
    documented = yaml.safe_load((CONFIGS / "sanm.yaml").read_text())["model"]["init_args"]["sanm"].get("init_args", {})
    assert SANM(**documented, seed=0).options == SANM(**PAPER, seed=0).options

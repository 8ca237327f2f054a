"""Controls of the mask's place and ratio hide equal areas."""

from pathlib import Path

import pytest
import torch
import yaml

from sanm_lightning import SANM
from sanm_lightning.models import create_network
from sanm_lightning.sanm import mask_box, mask_ratio, masked_fraction
from sanm_lightning.sanm.masking import shuffled_ratio

FOLDER = Path(__file__).parents[2] / "configs" / "sanm" / "equal_area"
RATIOS, PLACES = ("noise_aware", "shuffled", "fixed", "random"), ("cam", "random")
SIZE = (32, 32)


def hidden(name, quality, seed=0):
    """Return the masked fraction of each image (B,) under a config."""
    options = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["init_args"]["sanm"]["init_args"]
    torch.manual_seed(0)
    network = create_network("small_cnn", 4, width=4)
    sanm = SANM(seed=seed, **options)
    sanm.build(network, SIZE)
    images, targets = torch.rand(len(quality), 3, *SIZE), torch.full((len(quality), 4), 0.25)
    views = sanm(network, images, targets, quality)
    different = (views.images != images).any(1).float().mean((1, 2))
    assert torch.equal(different, masked_fraction(views.box, SIZE)), (
        "pixels outside of the box are masked, or none inside"
    )
    return different


def half_wrong(count=1024):
    """Return qualities of mean 1/2 with all values in between."""
    return torch.linspace(0, 1, count)[torch.randperm(count, generator=torch.Generator().manual_seed(1))]


def test_the_configs_are_those_of_this_test():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {f"{ratio}_{place}" for ratio in RATIOS for place in PLACES}


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("place", PLACES)
def test_the_mean_hidden_area_is_the_same_for_every_ratio_and_place(ratio, place):
    assert hidden(f"{ratio}_{place}", half_wrong()).mean() == pytest.approx(0.15, abs=0.003)


def test_the_area_of_a_box_inside_does_not_depend_on_its_place():
    ratio, aspect = torch.linspace(0, 0.5, 64), torch.linspace(0.8, 1.25, 64)
    areas = []
    for seed in range(3):
        maps = torch.rand(64, *SIZE, generator=torch.Generator().manual_seed(seed))
        areas.append(masked_fraction(mask_box(maps, ratio, aspect, anchor="inside"), SIZE))
    assert torch.equal(areas[0], areas[1])
    assert torch.equal(areas[0], areas[2])
    torch.testing.assert_close(areas[0], ratio, rtol=0, atol=0.03)


def test_a_box_inside_is_centered_at_the_maximum_unless_it_would_cross_the_border():
    maps = torch.zeros(2, *SIZE)
    maps[0, 16, 10] = maps[1, 0, 31] = 1
    box = mask_box(maps, torch.full((2,), 25 / 1024), torch.ones(2), anchor="inside")
    assert box.tolist() == [[14, 18.5, 8, 12.5], [0, 4.5, 27, 31.5]]  # five rows and columns


def test_shuffled_ratios_are_those_of_other_images():
    quality = half_wrong(256)
    found = shuffled_ratio(quality, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(found.sort().values, mask_ratio(quality, 0.3).sort().values)
    correlation = torch.corrcoef(torch.stack([found, mask_ratio(quality, 0.3)]))[0, 1]
    assert abs(float(correlation)) < 0.2

"""Forward passes of a cell, measured with a small network."""

from sanm_lightning.study.cost import passes_per_image


def test_a_method_with_known_labels_is_given_a_probe_set():
    """IEG: two views, the probe set, the pass in forward mode, three mixed images."""
    assert passes_per_image(["configs/method/ieg.yaml"], probe=True) == 7
    assert passes_per_image(["configs/method/ieg.yaml"]) is None

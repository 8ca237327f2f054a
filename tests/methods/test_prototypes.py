"""SMP against loops over samples and classes."""

import math

import pytest
import torch
from torch.nn import functional as F

from sanm_lightning import SANM
from sanm_lightning.functional import class_prototypes, density_peaks, select_peaks
from sanm_lightning.methods import SMP, CrossEntropy
from tests.methods.recorded import LABELS
from tests.methods.reference import SMALL, C, N, batch, predictions, ready
from tests.methods.toy import data, trainer


def cosines(features: torch.Tensor) -> list[list[float]]:
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in features.tolist()]
    return [[sum(a * b for a, b in zip(one, other, strict=True)) for other in rows] for one in rows]


class TestDensityPeaks:
    @pytest.mark.parametrize("fraction", [0.2, 0.4])
    def test_are_those_of_the_loop_over_pairs(self, fraction):
        """Eq. 3 to 5 of Han et al., one pair of samples at a time; of equal densities, the first is higher."""
        features = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
        density, nearest = density_peaks(features, fraction)
        similar = cosines(features)
        cut = sorted((value for row in similar for value in row), reverse=True)[int(fraction * 13 * 13)]
        for i, row in enumerate(similar):
            expected = sum((value > cut) - (value < cut) for value in row)
            assert float(density[i]) == pytest.approx(expected, abs=1.0)  # the pair at the threshold, by rounding
            higher = [value for j, value in enumerate(row) if (-density[j], j) < (-density[i], i)]
            assert float(nearest[i]) == pytest.approx(max(higher) if higher else min(row), abs=1e-5)

    def test_rows_compared_in_chunks_have_the_similarities_of_all_rows(self):
        half = torch.randint(0, 2, (20, 16), generator=torch.Generator().manual_seed(0)) * 2 - 1  # exact cosines
        features = torch.cat([half, half]).float()  # the threshold of the first half of the rows is that of all
        for one, other in zip(density_peaks(features), density_peaks(features, chunk=20), strict=True):
            assert torch.equal(one, other)

    def test_one_sample_is_its_own_peak(self):
        density, nearest = density_peaks(torch.ones(1, 3))
        assert select_peaks(density, nearest, 8).tolist() == [0]

    def test_selected_are_the_densest_below_the_bound(self):
        density = torch.tensor([5.0, 9.0, 7.0, 8.0, 1.0])
        similarity = torch.tensor([0.2, 0.1, 0.96, 0.5, 0.3])
        assert select_peaks(density, similarity, 3, 0.95).tolist() == [1, 3, 0]
        assert select_peaks(density, similarity, 8, 0.95).tolist() == [1, 3, 0, 4]
        assert select_peaks(density, torch.ones(5), 3, 0.95).tolist() == [1]

    def test_prototypes_are_found_in_planted_modes(self):
        """Two modes of a class: both have a prototype, and no outlier is one."""
        generator = torch.Generator().manual_seed(0)
        modes = torch.eye(4)[:2].repeat_interleave(20, 0) + 0.05 * torch.randn(40, 4, generator=generator)
        outlier = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
        density, nearest = density_peaks(torch.cat([modes, outlier]))
        assert {int(i >= 20) for i in select_peaks(density, nearest, 2)} == {0, 1}
        assert 40 not in select_peaks(density, nearest, 2)


def test_a_class_without_samples_has_zeros_and_a_small_class_all_of_its_samples():
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    means = class_prototypes(
        features, torch.tensor([0, 0, 0, 2, 2]), 3, 100, 100, torch.Generator(), max_similarity=1.1
    )
    rows = F.normalize(features, dim=1)
    torch.testing.assert_close(means, torch.stack([rows[:3].mean(0), torch.zeros(3), rows[3:].mean(0)]))


class TestSMP:
    def test_second_labels_are_those_of_the_largest_mean_similarity(self):
        """With every sample a prototype: the class whose members are on average the most similar."""
        module = ready(SMP(**SMALL, warmup_epochs=1, prototypes=N, max_similarity=1.0), 1)
        features = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
        module.predict_train = lambda *_, **__: {"features": features, "labels": LABELS, "index": torch.arange(N)}
        module.begin_epoch()
        similar = cosines(features)
        for i in range(N):
            means = [
                sum(similar[i][j] for j in range(N) if int(LABELS[j]) == c) / sum(int(y) == c for y in LABELS)
                for c in range(C)
            ]
            assert int(module.corrected.labels[i]) == max(range(C), key=means.__getitem__)
        differs = module.corrected.labels != LABELS
        assert bool(differs.any())
        assert torch.equal(module.label_quality(), torch.where(differs, 0.5, 1.0))

    def test_a_step_is_the_mixture_of_both_cross_entropies(self):
        module, given = ready(SMP(**SMALL, warmup_epochs=1, alpha=0.3), 1), batch()
        module.corrected.update(labels=(torch.arange(N) + 1) % C)
        found, total = predictions(module.network, given.images), 0.0
        for p, y in zip(found, given.labels.tolist(), strict=True):
            total -= (0.7 * math.log(p[y]) + 0.3 * math.log(p[(y + 1) % C])) / len(found)
        assert float(module.training_step(given, 0).detach()) == pytest.approx(total, rel=1e-4)

    @pytest.mark.parametrize(("epoch", "options"), [(0, {}), (1, {"alpha": 0.0})])
    def test_the_first_stage_and_alpha_0_are_cross_entropy(self, epoch, options):
        module, given = ready(SMP(**SMALL, warmup_epochs=1, **options), epoch), batch()
        module.corrected.update(labels=(torch.arange(N) + 1) % C)
        plain = ready(CrossEntropy(**SMALL))
        plain.network.load_state_dict(module.network.state_dict())
        torch.testing.assert_close(module.training_step(given, 0), plain.training_step(given, 0))

    def test_masks_follow_the_quality(self):
        module = ready(SMP(**SMALL, warmup_epochs=1, sanm=SANM(mu=0.5, seed=0)), 1)
        module.corrected.update(quality=torch.linspace(0, 1, N))
        seen, forward = [], module.sanm.forward
        module.sanm.forward = lambda *args, **options: seen.append(forward(*args, **options)) or seen[-1]
        module.training_step(given := batch(), 0)
        torch.testing.assert_close(
            seen[0].ratio, 0.5 * (1 - torch.linspace(0, 1, N)[given.index]), rtol=1e-4, atol=1e-4
        )

    def test_classes_smaller_than_the_sample_are_reported_once(self, monkeypatch):
        lines = []
        monkeypatch.setattr("sanm_lightning.methods.smp.rank_zero_info", lines.append)
        trainer(3).fit(SMP(**SMALL, warmup_epochs=1), data())
        assert len(lines) == 1
        assert "fewer than samples = 1280 members" in lines[0]

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"alpha": 2.0}, r"expected alpha in \[0, 1\], got 2.0"),
            ({"prototypes": 0}, "expected prototypes >= 1, got 0"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            SMP(**SMALL, **options)

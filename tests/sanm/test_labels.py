"""Labels softened by what was hidden: Eq. 7, against a loop over single classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sanm_lightning.sanm import regularize_labels

quick = settings(max_examples=50, deadline=None)
shapes = st.tuples(st.integers(0, 6), st.integers(2, 12))
seeds = st.integers(0, 2**31)


def soft_targets(batch: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def ratios(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, generator=torch.Generator().manual_seed(seed))


def slow_labels(targets: Tensor, ratio: Tensor) -> Tensor:
    """Eq. 7, one image, one class at a time; the top class cannot give more than it has."""
    batch, classes = targets.shape
    out = torch.zeros(batch, classes, dtype=torch.float64)
    for i in range(batch):
        row = [float(value) for value in targets[i]]
        top = row.index(max(row))
        moved = min(float(ratio[i]), row[top])
        for j in range(classes):
            out[i, j] = row[j] - moved + moved / classes if j == top else row[j] + moved / classes
    return out


class TestRegularizeLabels:
    @quick
    @given(shapes, seeds)
    def test_matches_the_loop_over_eq_7(self, shape: tuple[int, int], seed: int) -> None:
        targets, ratio = soft_targets(*shape, seed=seed), ratios(shape[0], seed)
        torch.testing.assert_close(
            regularize_labels(targets, ratio).double(), slow_labels(targets, ratio), rtol=1e-5, atol=1e-6
        )

    @quick
    @given(shapes, seeds)
    def test_of_a_hard_label_is_label_smoothing(self, shape: tuple[int, int], seed: int) -> None:
        labels = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(seed))
        targets, ratio = F.one_hot(labels, shape[1]).float(), ratios(shape[0], seed)[:, None]
        torch.testing.assert_close(
            regularize_labels(targets, ratio[:, 0]), (1 - ratio) * targets + ratio / shape[1], rtol=1e-5, atol=1e-6
        )

    @quick
    @given(shapes, seeds)
    def test_smoothing_is_a_mixture_with_the_uniform_distribution(self, shape: tuple[int, int], seed: int) -> None:
        targets, ratio = soft_targets(*shape, seed=seed), ratios(shape[0], seed)
        out = regularize_labels(targets, ratio, spread="smoothing")
        torch.testing.assert_close(out, (1 - ratio[:, None]) * targets + ratio[:, None] / shape[1])

    def test_smoothing_keeps_the_top_class_of_a_flat_target_and_eq_7_does_not(self) -> None:
        targets = torch.tensor([[0.28, *[0.08] * 9]])
        ratio = torch.tensor([0.276])
        assert regularize_labels(targets, ratio, spread="smoothing").argmax(1).item() == 0
        assert regularize_labels(targets, ratio).argmin(1).item() == 0

    @quick
    @given(shapes, seeds)
    def test_stays_on_the_simplex(self, shape: tuple[int, int], seed: int) -> None:
        out = regularize_labels(soft_targets(*shape, seed=seed), ratios(shape[0], seed))
        assert (out >= 0).all()
        torch.testing.assert_close(out.sum(1), torch.ones(shape[0]))

    def test_stays_on_the_simplex_even_for_a_flat_target(self) -> None:
        out = regularize_labels(torch.full((4, 100), 0.01), torch.full((4,), 0.10))
        assert (out >= 0).all()
        torch.testing.assert_close(out.sum(1), torch.ones(4))

    @quick
    @given(shapes, seeds)
    def test_of_an_unmasked_image_changes_no_bit(self, shape: tuple[int, int], seed: int) -> None:
        targets = soft_targets(*shape, seed=seed)
        assert torch.equal(regularize_labels(targets, torch.zeros(shape[0])), targets)

    def test_of_an_image_hidden_altogether_is_uniform(self) -> None:
        torch.testing.assert_close(regularize_labels(torch.eye(5), torch.ones(5)), torch.full((5, 5), 0.2))

    def test_of_equal_tops_takes_from_the_first(self) -> None:
        out = regularize_labels(torch.tensor([[0.2, 0.4, 0.4]]), torch.tensor([0.3]))
        torch.testing.assert_close(out, torch.tensor([[0.3, 0.2, 0.5]]))

    def test_leaves_its_inputs_alone(self) -> None:
        targets, ratio = soft_targets(3, 4), ratios(3)
        before = targets.clone(), ratio.clone()
        regularize_labels(targets, ratio)
        assert torch.equal(targets, before[0])
        assert torch.equal(ratio, before[1])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("ratio_dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_keeps_the_precision_of_the_targets(self, dtype: torch.dtype, ratio_dtype: torch.dtype) -> None:
        targets, ratio = soft_targets(6, 4).to(dtype), ratios(6).to(ratio_dtype)
        out = regularize_labels(targets, ratio)
        assert out.dtype == dtype
        assert (out >= 0).all()
        loose = 2e-2 if torch.bfloat16 in (dtype, ratio_dtype) else 1e-6
        torch.testing.assert_close(out.double(), slow_labels(targets, ratio), rtol=loose, atol=loose)

    @pytest.mark.parametrize(
        ("targets", "ratio"),
        [
            (torch.ones(3), torch.ones(3)),
            (torch.ones(3, 1), torch.ones(3)),
            (torch.ones(3, 4, 1), torch.ones(3)),
            (torch.ones(3, 4), torch.ones(3, 4)),
            (torch.ones(3, 4), torch.ones(3, 1)),
            (torch.ones(3, 4), torch.ones(2)),
            (torch.ones(3, 4), torch.tensor(0.3)),
            (torch.ones(3, 4, dtype=torch.long), torch.ones(3)),
        ],
    )
    def test_refuses_shapes_that_do_not_fit(self, targets: Tensor, ratio: Tensor) -> None:
        with pytest.raises(
            ValueError, match=r"expected floating targets \(B, C\) with C >= 2 and ratio \(B,\), got \("
        ):
            regularize_labels(targets, ratio)

    @pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
    def test_refuses_a_ratio_that_is_no_share(self, wrong: float) -> None:
        with pytest.raises(ValueError, match=r"expected ratio in \[0, 1\], got"):
            regularize_labels(torch.eye(2), torch.tensor([0.5, wrong]))

    def test_does_not_look_at_values_on_another_device_than_the_cpu(self) -> None:
        meta = torch.device("meta")  # any look at a value raises there
        assert regularize_labels(torch.ones(2, 3, device=meta), torch.ones(2, device=meta)).shape == (2, 3)

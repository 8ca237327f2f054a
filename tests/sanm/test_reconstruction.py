"""Painting the hidden part back: Eq. 10 and the decoder of Eq. 9."""

import pytest
import torch
from torch import Tensor

from sanm_lightning.sanm import Decoder, reconstruction_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class TestReconstructionLoss:
    def test_matches_the_loop_over_eq_10_as_a_mean(self) -> None:
        painted, images = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
        total = 0.0
        for i in range(2):
            for channel in range(3):
                for m in range(4):
                    for n in range(5):
                        total += (float(painted[i, channel, m, n]) - float(images[i, channel, m, n])) ** 2
        out = reconstruction_loss(painted, images)
        assert out.shape == ()
        assert out.item() == pytest.approx(total / (2 * 3 * 4 * 5), rel=1e-5)

    def test_of_a_perfect_copy_is_zero(self) -> None:
        assert reconstruction_loss(random(2, 3, 4, 4), random(2, 3, 4, 4)).item() == 0

    def test_pulls_each_pixel_towards_the_image(self) -> None:
        painted, images = random(1, 3, 4, 4).requires_grad_(), random(1, 3, 4, 4, seed=1)
        reconstruction_loss(painted, images).backward()
        torch.testing.assert_close(painted.grad, 2 * (painted.detach() - images) / images.numel())

    @pytest.mark.parametrize("painted", [torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("image", [torch.bfloat16, torch.float32, torch.float64])
    def test_is_in_float32_or_better(self, painted: torch.dtype, image: torch.dtype) -> None:
        out = reconstruction_loss(random(1, 3, 4, 4).to(painted), random(1, 3, 4, 4, seed=1).to(image))
        assert out.dtype == (torch.float64 if torch.float64 in (painted, image) else torch.float32)

    @pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 4), (3, 4, 4), (2, 1, 4, 4)])
    def test_refuses_another_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"expected a reconstruction of the images' shape \(2, 3, 4, 4\), got \("):
            reconstruction_loss(torch.ones(shape), torch.ones(2, 3, 4, 4))


class TestDecoder:
    @pytest.mark.parametrize(
        ("map_size", "image_size", "doublings"),
        [
            ((4, 4), (32, 32), 3),
            ((2, 2), (32, 32), 4),
            ((7, 7), (224, 224), 5),
            ((5, 3), (37, 20), 3),
            ((1, 1), (8, 8), 3),
            ((8, 8), (8, 8), 0),
            ((8, 8), (5, 6), 0),
        ],
    )
    def test_paints_an_image_of_the_right_size(
        self, map_size: tuple[int, int], image_size: tuple[int, int], doublings: int
    ) -> None:
        decoder = Decoder(20, map_size, image_size)
        painted = decoder(random(2, 20, *map_size))
        assert painted.shape == (2, 3, *image_size)
        assert len([p for p in decoder.parameters() if p.shape[-1] == 4]) == doublings

    def test_every_parameter_takes_part(self) -> None:
        decoder = Decoder(8, (4, 4), (30, 32))
        decoder(random(2, 8, 4, 4)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())

    def test_is_affine(self) -> None:
        decoder = Decoder(8, (3, 3), (20, 20)).double()
        one, other = random(1, 8, 3, 3).double(), random(1, 8, 3, 3, seed=1).double()
        middle = decoder((one + other) / 2)
        torch.testing.assert_close(middle, (decoder(one) + decoder(other)) / 2)

    def test_one_seed_gives_one_decoder(self) -> None:
        one, same, other = (next(Decoder(8, (2, 2), (8, 8), seed).parameters()) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_is_made_without_a_trace_in_the_global_stream(self) -> None:
        before, seed = torch.get_rng_state(), torch.initial_seed()
        Decoder(8, (2, 2), (8, 8), seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.initial_seed() == seed

    def test_is_made_without_a_trace_on_accelerators(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seeded: list[int] = []
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
        Decoder(8, (2, 2), (8, 8), seed=5)
        assert seeded == []

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("image_size", [(8, 8), (7, 9)])
    def test_works_in_another_precision(self, dtype: torch.dtype, image_size: tuple[int, int]) -> None:
        painted = Decoder(8, (2, 2), image_size).to(dtype)(random(2, 8, 2, 2).to(dtype))
        assert painted.dtype in (dtype, torch.promote_types(dtype, torch.float32))

    @pytest.mark.parametrize(
        ("channels", "map_size", "image_size"), [(0, (2, 2), (8, 8)), (8, (0, 2), (8, 8)), (8, (2, 2), (8, -1))]
    )
    def test_refuses_a_size_that_is_not_positive(
        self, channels: int, map_size: tuple[int, int], image_size: tuple[int, int]
    ) -> None:
        with pytest.raises(ValueError, match="expected positive sizes, got channels"):
            Decoder(channels, map_size, image_size)

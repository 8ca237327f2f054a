"""SANM as one module: what it hands to a method, and what it leaves untouched."""

import copy
import io
import pickle
from typing import Any, get_args

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.sanm import SANM, FrozenNetwork, Views, apply_mask, clean_probability, mask_box, regularize_labels
from sanm_lightning.sanm import module as sanm_module
from sanm_lightning.sanm.activation import upsample
from sanm_lightning.sanm.inference import inference_context
from sanm_lightning.sanm.masking import RatioName

SIZE = (16, 16)


class Small(nn.Module):
    """A network by timm's conventions with all that can leave a trace: batch norm, dropout, a functional draw."""

    def __init__(self, classes: int = 4, dropout: float = 0.5) -> None:
        super().__init__()
        self.num_features = 6
        self.layers = nn.Sequential(
            nn.Conv2d(3, 5, 3, stride=2, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(5, 6, 3, stride=2, padding=1),
        )
        self.frozen = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, classes)
        self.calls = 0
        self.draws_anyway = False

    def forward_features(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.frozen(self.layers(x))
        return F.dropout(out, 0.5, training=True) if self.draws_anyway else out

    def forward_head(self, features: Tensor) -> Tensor:
        out: Tensor = self.fc(features.mean(dim=(2, 3)))
        return out

    def get_classifier(self) -> nn.Module:
        return self.fc


class ChannelsLast(Small):
    """The same with maps as Swin has them."""

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x).permute(0, 2, 3, 1)

    def forward_head(self, features: Tensor) -> Tensor:
        return super().forward_head(features.permute(0, 3, 1, 2))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def network(kind: type[Small] = Small, **options: Any) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**options)


def batch(size: int = 6, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.arange(size) % classes
    return random(size, 3, *SIZE, seed=seed), F.one_hot(labels, classes).float(), random(size, seed=seed + 1)


def built(net: Any = None, **options: Any) -> tuple[SANM, Any]:
    net = network() if net is None else net
    sanm = SANM(**{"seed": 3, **options})
    sanm.build(net, SIZE)
    return sanm, net


def same(one: Views, other: Views) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


class TestViews:
    @pytest.mark.parametrize("fill", ["pixel", "channel"])
    def test_are_the_functions_put_together_in_the_order_of_algorithm_1(self, fill: str) -> None:
        sanm, net = built(fill=fill, batch_statistics=False)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        reference = copy.deepcopy(net).eval()
        features = reference.forward_features(images)
        logits = reference.forward_head(features)  # step 3
        maps = torch.stack(
            [
                (reference.fc.weight[c, :, None, None] * f).sum(0)
                for c, f in zip(logits.argmax(1), features, strict=True)
            ]
        )  # step 4, of the predicted class
        torch.testing.assert_close(views.logits, logits.detach())
        torch.testing.assert_close(views.activation, upsample(maps.detach(), SIZE), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(views.ratio, 0.3 * (1 - quality))  # step 5
        up, down, left, right = views.box.unbind(1)
        centre = views.activation.flatten(1).argmax(1)
        assert ((up <= centre // 16) & (centre // 16 <= down) & (left <= centre % 16) & (centre % 16 <= right)).all()
        outside = apply_mask(torch.zeros_like(images), views.box) == 0
        assert torch.equal(views.images[outside], images[outside])
        assert (views.images[~outside] != images[~outside]).float().mean() > 0.9
        assert torch.equal(views.targets, regularize_labels(targets, views.ratio))  # step 7

    def test_have_boxes_of_the_aspects_of_eq_3(self) -> None:
        sanm, net = built(mu=0.05, place="random")  # small boxes, most of them away from the border
        images, targets, _ = batch(300)
        views = sanm(net, images, targets, torch.zeros(300))
        up, down, left, right = views.box.unbind(1)
        interior = (up > 0) & (down < 16) & (left > 0) & (right < 16)
        aspect = ((down - up) / (right - left))[interior]
        assert ((aspect >= 0.8 - 1e-3) & (aspect <= 1.25 + 1e-3)).all()
        assert aspect.min() < 0.82
        assert aspect.max() > 1.22
        area = ((down - up) * (right - left))[interior]
        torch.testing.assert_close(area, torch.full_like(area, 0.05 * 256), rtol=1e-3, atol=0)

    def test_with_delta_one_have_square_boxes(self) -> None:
        sanm, net = built(mu=0.1, delta=1.0)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        assert torch.equal(views.box, mask_box(views.activation, views.ratio, torch.ones(6)))

    def test_leave_the_batch_alone(self) -> None:
        sanm, net = built()
        given = batch()
        before = [tensor.clone() for tensor in given]
        sanm(net, *given)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))

    def test_differ_from_step_to_step_and_repeat_with_the_seed(self) -> None:
        (one, net), (other, _), (third, _) = built(), built(), built(seed=4)
        first, second = one(net, *batch()), one(net, *batch())
        assert not torch.equal(first.images, second.images)
        assert same(first, other(net, *batch()))
        assert same(second, other(net, *batch()))
        assert not torch.equal(first.images, third(net, *batch()).images)

    def test_differ_on_two_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers = []
        for rank in (0, 1, 1):
            monkeypatch.setattr(sanm_module, "process_rank", lambda rank=rank: rank)
            sanm, net = built()
            answers.append(sanm(net, *batch()))
        assert not torch.equal(answers[0].images, answers[1].images)
        assert not torch.equal(answers[0].box, answers[1].box)
        assert same(answers[1], answers[2])

    def test_tell_of_the_quality_the_masked_fraction_and_the_reconstruction(self) -> None:
        sanm, net = built()
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        loss = sanm.reconstruction(net.forward_features(views.images), images)
        assert set(sanm.last) == {"quality", "masked_fraction", "reconstruction_loss"}
        assert not any(figure.requires_grad for figure in sanm.last.values())
        assert sanm.last["quality"] == quality.mean()
        assert 0 < sanm.last["masked_fraction"] <= 0.3
        torch.testing.assert_close(0.02 * sanm.last["reconstruction_loss"], loss.detach())

    def test_take_a_quality_made_of_the_logits_of_the_unmasked_images(self) -> None:
        sanm, net = built()
        images, targets, quality = batch()
        asked: list[Tensor] = []

        def answer(logits: Tensor) -> Tensor:
            asked.append(logits)
            return quality

        views = sanm(net, images, targets, answer)
        assert same(views, built()[0](net, images, targets, quality))
        assert torch.equal(asked[0], views.logits)

    def test_take_images_in_bfloat16_and_float64(self) -> None:
        for dtype in (torch.bfloat16, torch.float64):
            sanm, net = built(network(dropout=0.0).to(dtype))
            images, targets, quality = batch()
            views = sanm(net, images.to(dtype), targets.to(dtype), quality)
            assert views.images.dtype == views.targets.dtype == dtype
            assert views.box.dtype == torch.float32
            loss = sanm.reconstruction(net.forward_features(views.images), images.to(dtype))
            loss.backward()
            assert torch.isfinite(loss)

    def test_come_from_channels_last_maps_too(self) -> None:
        (sanm, net), (other, turned) = built(), built(network(ChannelsLast))
        images, targets, quality = batch()
        views = other(turned, images, targets, quality)
        assert same(sanm(net, images, targets, quality), views)
        turned.eval(), net.eval()
        torch.testing.assert_close(
            other.reconstruction(turned.forward_features(views.images), images),
            sanm.reconstruction(net.forward_features(views.images), images),
        )

    def test_unmasked_finds_the_logits_of_the_unmasked_images(self) -> None:
        logits = random(4, 3)
        plain = Views(random(4, 3, 2, 2), random(4, 3))
        assert plain.unmasked(logits) is logits
        assert plain._replace(logits=random(4, 3, seed=1)).unmasked(logits).equal(random(4, 3, seed=1))
        assert plain._replace(ratio=torch.ones(2)).unmasked(logits).equal(logits[:2])


class TestLeavesNoTrace:
    @pytest.mark.parametrize("batch_statistics", [True, False])
    @pytest.mark.parametrize("place", ["cam", "energy", "random"])
    def test_in_statistics_parameters_modes_and_streams(self, place: Any, batch_statistics: bool) -> None:
        sanm, net = built(place=place, batch_statistics=batch_statistics)
        net.frozen.eval()  # as a user may want it
        net.draws_anyway = True
        modes = [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
        state, stream = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        sanm(net, *batch())
        assert [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()] == modes
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), stream)
        assert all(p.grad is None for p in net.parameters())

    def test_even_where_the_network_fails(self) -> None:
        net = network()
        modes = [m.training for m in net.modules()]
        stream = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="channels"), inference_context(net, batch()[0], batch_statistics=True):
            net.forward_features(torch.ones(1, 7, 4, 4) + torch.rand(1))
        assert [m.training for m in net.modules()] == modes
        assert net.frozen.track_running_stats
        assert torch.equal(torch.get_rng_state(), stream)
        assert torch.is_grad_enabled()

    def test_in_autocast_s_cache_of_weights(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with inference_context(network(), batch()[0]):
                assert torch.is_autocast_enabled("cpu")
                assert torch.get_autocast_dtype("cpu") == torch.bfloat16
                assert not torch.is_autocast_cache_enabled()
            assert torch.is_autocast_cache_enabled()

    def test_when_it_is_built(self) -> None:
        net = network()
        state, stream = copy.deepcopy(net.state_dict()), torch.get_rng_state()
        built(net)
        assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
        assert all(m.training for m in net.modules())
        assert torch.equal(torch.get_rng_state(), stream)

    def test_looks_without_dropout(self) -> None:
        sanm, net = built()
        images, targets, quality = batch()
        assert torch.equal(sanm(net, images, targets, quality).logits, sanm(net, images, targets, quality).logits)

    def test_looks_with_the_batch_s_statistics_where_asked_but_not_in_a_norm_that_the_user_froze(self) -> None:
        sanm, net = built(network(dropout=0.0), batch_statistics=True)
        images, targets, quality = batch()
        net.frozen.eval()
        expected = copy.deepcopy(net)
        looked = sanm(net, images, targets, quality).logits
        torch.testing.assert_close(looked, expected.forward_head(expected.forward_features(images)).detach())
        torch.testing.assert_close(
            built(net, batch_statistics=False)[0](net, images, targets, quality).logits,
            net.eval().forward_head(net.forward_features(images)).detach(),
        )


class TestGradient:
    def test_none_passes_through_the_making_of_views(self) -> None:
        sanm, net = built()
        images, targets, _ = batch()
        views = sanm(net, images.requires_grad_(), targets, lambda logits: logits.softmax(1).amax(1))
        assert not any(part.requires_grad for part in views if part is not None)

    def test_reconstruction_teaches_encoder_and_decoder_but_no_classifier(self) -> None:
        sanm, net = built()
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        sanm.reconstruction(net.forward_features(views.images), images).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sanm.decoder.parameters())
        for name in ("layers.0.weight", "layers.4.weight"):
            assert net.get_parameter(name).grad.abs().sum() > 0
        assert net.fc.weight.grad is None

    def test_reconstruction_is_beta_times_the_mean_squared_error(self) -> None:
        sanm, net = built(beta=0.5)
        images, targets, quality = batch()
        sanm(net, images, targets, quality)
        features = random(6, 6, 4, 4)
        expected = 0.5 * (sanm.decoder(features) - images).square().mean()
        torch.testing.assert_close(sanm.reconstruction(features, images), expected)

    @pytest.mark.parametrize("bf16", [False, True])
    def test_with_mu_and_beta_zero_is_that_of_the_plain_method(self, bf16: bool) -> None:
        gradients = []
        for sanm in (SANM(mu=0, beta=0, seed=1), None):
            net, (images, targets, quality) = network(dropout=0.0), batch()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                if sanm is not None:
                    images, targets, *_ = sanm(net, images, targets, quality)
                features = net.forward_features(images)
                loss = F.cross_entropy(net.forward_head(features), targets)
                if sanm is not None:
                    loss = loss + sanm.reconstruction(features, images)
            loss.backward()
            assert all(p.grad is not None for p in net.parameters())  # autocast's cache of weights would lose some
            gradients.append([p.grad for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    def test_under_autocast_boxes_are_not_rounded(self) -> None:
        sanm, net = built()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            views = sanm(net, *batch())
        assert views.box.dtype == views.activation.dtype == torch.float32
        assert views.images.dtype == torch.float32


class TestLimits:
    def test_with_mu_and_beta_zero_hands_back_what_it_was_given(self) -> None:
        sanm, net = built(mu=0, beta=0)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        assert torch.equal(views.images, images)
        assert torch.equal(views.targets, targets)
        assert sanm.reconstruction(net.forward_features(images), images) == 0
        assert not list(sanm.parameters())

    def test_off_does_nothing_at_all(self) -> None:
        sanm, net = SANM.off(), network()
        sanm.build(net, SIZE)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        assert views.images is images
        assert views.targets is targets
        assert net.calls == 0
        assert sanm.reconstruction(random(6, 6, 4, 4), images) == 0
        assert not sanm.enabled
        assert not sanm.masking(10)

    def test_a_trusted_batch_is_handed_back(self) -> None:
        sanm, net = built()
        images, targets, _ = batch()
        views = sanm(net, images, targets, torch.ones(6))
        assert torch.equal(views.images, images)
        assert torch.equal(views.targets, targets)

    def test_before_the_first_mask_nothing_is_hidden_and_the_decoder_has_weight_zero(self) -> None:
        sanm, net = built()
        images, targets, _ = batch()
        net.calls = 0
        views = sanm(net, images, targets, None)
        assert views.images is images
        assert views.targets is targets
        assert net.calls == 0
        loss = sanm.reconstruction(net.forward_features(images), images)
        assert loss == 0
        loss.backward()
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in sanm.decoder.parameters())
        assert sanm.last == {}

    @pytest.mark.parametrize(("own", "methods", "first"), [(None, 0, 0), (None, 3, 3), (2, 5, 2), (0, 5, 0)])
    def test_masks_begin_after_the_warm_up(self, own: int | None, methods: int, first: int) -> None:
        sanm = SANM(warmup_epochs=own)
        assert [sanm.masking(epoch, methods) for epoch in range(8)] == [epoch >= first for epoch in range(8)]


class TestSwitches:
    def test_masks_alone(self) -> None:
        sanm, net = built(labels=False, reconstruct=False)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        assert not torch.equal(views.images, images)
        assert torch.equal(views.targets, targets)
        assert sanm.decoder is None
        assert sanm.reconstruction(random(6, 6, 4, 4), images) == 0

    def test_labels_alone(self) -> None:
        sanm, net = built(mask=False, reconstruct=False)
        images, targets, quality = batch()
        net.calls = 0
        views = sanm(net, images, targets, quality)
        assert torch.equal(views.images, images)
        assert torch.equal(views.targets, regularize_labels(targets, 0.3 * (1 - quality)))
        assert views.box is views.activation is views.logits is None
        assert net.calls == 0  # a known quality needs no extra pass
        assert sanm.decoder is None

    def test_reconstruction_alone(self) -> None:
        sanm, net = built(mask=False, labels=False)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        assert torch.equal(views.images, images)
        assert torch.equal(views.targets, targets)
        assert sanm.reconstruction(net.forward_features(views.images), images) > 0

    @pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_mambaout"])
    def test_without_masks_any_head_will_do(self, name: str) -> None:
        sanm, net = built(timm.create_model(name, num_classes=4), mask=False, reconstruct=False)
        images, targets, quality = batch()
        views = sanm(net, images, targets, lambda logits: quality)
        assert torch.equal(views.images, images)
        assert views.logits.shape == (6, 4)


class TestPlaces:
    def test_energy_is_the_sum_of_squared_features(self) -> None:
        sanm, net = built(place="energy", batch_statistics=False)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        energy = net.eval().forward_features(images).square().sum(1).detach()
        torch.testing.assert_close(views.activation, upsample(energy, SIZE))

    def test_random_is_everywhere_and_asks_no_network(self) -> None:
        sanm, net = built(place="random", mu=0.01)
        images, targets, _ = batch(200)
        views = sanm(net, images, targets, torch.zeros(200))
        peaks = views.activation.flatten(1).argmax(1)
        assert peaks.unique().numel() > 100
        assert not torch.equal(peaks, sanm(net, images, targets, torch.zeros(200)).activation.flatten(1).argmax(1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_a_frozen_network_looks_in_its_stead(self, dtype: torch.dtype) -> None:
        place = FrozenNetwork("test_resnet", pretrained=False)
        sanm, net = built(network().to(dtype), place=place)
        images, targets, quality = batch()
        frozen = copy.deepcopy(place.network.state_dict())
        views = sanm(net, images.to(dtype), targets, quality)
        net.fc.weight.data.normal_()
        again = sanm(net, images.to(dtype), targets, quality)
        assert torch.equal(views.activation, again.activation)
        torch.testing.assert_close(views.activation, upsample(place(images.to(dtype)), SIZE))
        assert all(torch.equal(frozen[name], value) for name, value in place.network.state_dict().items())

    def test_a_frozen_network_is_no_part_of_the_module(self) -> None:
        with_it, without = (built(place=place)[0] for place in (FrozenNetwork("test_resnet", pretrained=False), "cam"))
        assert list(with_it.state_dict()) == list(without.state_dict())
        assert len(list(with_it.parameters())) == len(list(without.parameters()))
        assert with_it.train().place.network.training is False
        assert not any(p.requires_grad for p in with_it.place.network.parameters())
        assert with_it.options["place"]["init_args"]["name"] == "test_resnet"

    def test_a_frozen_network_sees_images_normalised_and_of_its_own_size(self) -> None:
        place = FrozenNetwork("test_resnet", pretrained=False)
        seen: list[Tensor] = []
        place.network.register_forward_pre_hook(lambda *_: None)
        original = place.network.forward_features
        place.network.forward_features = lambda x: (seen.append(x), original(x))[1]
        place(torch.full((2, 3, 8, 8), 0.25))
        assert seen[0].shape == (2, 3, *place.size)
        expected = ((0.25 - place.mean) / place.std).expand_as(seen[0])
        torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)

    def test_a_frozen_network_is_made_without_a_trace_in_the_global_stream(self) -> None:
        stream = torch.get_rng_state()
        FrozenNetwork("test_resnet", pretrained=False)
        assert torch.equal(torch.get_rng_state(), stream)

    @pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit"])
    def test_a_frozen_network_without_a_class_activation_map_has_that_of_its_gradient(self, name: str) -> None:
        place = FrozenNetwork(name, pretrained=False)
        sanm, net = built(place=place)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        assert views.activation.flatten(1).std(1).min() > 0
        assert not any(p.requires_grad for p in place.network.parameters())


class TestRatios:
    @pytest.mark.parametrize(
        ("ratio", "ratio_range", "low", "high"),
        [
            ("random", None, 0.2, 0.4),
            ("random", (0.05, 0.1), 0.05, 0.1),
            ("affine", None, 0.02, 0.07),
            ("affine", (0.0, 0.5), 0.0, 0.5),
        ],
    )
    def test_drawn_ones_fill_their_range(
        self, ratio: Any, ratio_range: tuple[float, float] | None, low: float, high: float
    ) -> None:
        sanm, net = built(ratio=ratio, ratio_range=ratio_range, mu=0.03, place="random")
        images, targets, _ = batch(300)
        quality = random(300)
        drawn = sanm(net, images, targets, quality).ratio - (0.03 * (1 - quality) if ratio == "affine" else 0)
        assert ((drawn >= low - 1e-6) & (drawn <= high + 1e-6)).all()
        assert drawn.min() < low + 0.1 * (high - low)
        assert drawn.max() > high - 0.1 * (high - low)

    @pytest.mark.parametrize(
        ("ratio", "ratio_range", "expected"),
        [
            ("noise_aware", None, [0.3, 0.18, 0.15, 0.0]),
            ("fixed", None, [0.3, 0.3, 0.3, 0.3]),
            ("two_level", None, [0.3, 0.3, 0.2, 0.2]),
            ("two_level", (0.1, 0.4), [0.4, 0.4, 0.1, 0.1]),
        ],
    )
    def test_the_others_follow_from_quality(
        self, ratio: Any, ratio_range: tuple[float, float] | None, expected: list[float]
    ) -> None:
        sanm, net = built(ratio=ratio, ratio_range=ratio_range)
        images, targets, _ = batch(4)
        views = sanm(net, images, targets, torch.tensor([0.0, 0.4, 0.5, 1.0]))
        torch.testing.assert_close(views.ratio, torch.tensor(expected))
        torch.testing.assert_close(views.targets, regularize_labels(targets, torch.tensor(expected)))


class TestKeepUnmasked:
    def test_sets_the_given_batch_before_the_masked_one(self) -> None:
        sanm, net = built(keep_unmasked=True)
        images, targets, quality = batch()
        views = sanm(net, images, targets, quality)
        masked = built()[0](net, images, targets, quality)
        assert torch.equal(views.images, torch.cat([images, masked.images]))
        assert torch.equal(views.targets, torch.cat([targets, masked.targets]))
        assert views.ratio.shape == (6,)
        assert views.box.shape == (6, 4)

    def test_reconstructs_from_the_masked_half_only(self) -> None:
        (sanm, net), (plain, _) = built(keep_unmasked=True), built()
        images, targets, quality = batch()
        sanm(net, images, targets, quality)
        plain(net, images, targets, quality)
        features = random(12, 6, 4, 4).requires_grad_()
        loss = sanm.reconstruction(features, images)
        torch.testing.assert_close(loss, plain.reconstruction(features[6:], images))
        loss.backward()
        assert not features.grad[:6].any()
        assert features.grad[6:].any()

    def test_before_the_first_mask_doubles_nothing(self) -> None:
        sanm, net = built(keep_unmasked=True)
        images, targets, _ = batch()
        assert sanm(net, images, targets, None).images is images
        assert sanm.reconstruction(random(6, 6, 4, 4), images) == 0


class TestQualityOfTheModule:
    def test_is_estimated_from_what_label_quality_knows(self) -> None:
        sanm, net = built()
        images, targets, _ = batch(10)
        sanm.label_quality.reset(20)
        losses = torch.cat([0.1 + 0.01 * random(12), 3 + random(8)])
        index = torch.arange(20)
        logits = torch.stack([(-losses).exp().log(), (1 - (-losses).exp()).log()], 1)
        sanm.label_quality.update(logits, F.one_hot(torch.zeros(20, dtype=torch.long), 2).float(), index)
        sanm.label_quality.fit()
        asked = torch.arange(5, 15)
        views = sanm(net, images, targets, sanm.source_of_quality(targets, asked, None))
        torch.testing.assert_close(views.ratio, 0.3 * (1 - clean_probability(losses)[asked]), rtol=1e-2, atol=1e-3)

    def test_of_an_oracle_is_one_where_the_given_label_is_right(self) -> None:
        sanm, net = built(quality="oracle")
        images, targets, _ = batch()
        true = targets.argmax(1).clone()
        true[2] = (true[2] + 1) % 4
        quality = sanm.source_of_quality(targets, None, true)
        assert torch.equal(quality, torch.tensor([1.0, 1, 0, 1, 1, 1]))
        assert sanm(net, images, targets, quality).ratio.nonzero().flatten().tolist() == [2]

    def test_of_an_oracle_needs_true_labels(self) -> None:
        with pytest.raises(ValueError, match="expected batches with true_labels for quality: oracle, got none"):
            SANM(quality="oracle").source_of_quality(batch()[1])


@pytest.mark.parametrize("ratio", get_args(RatioName))
def test_a_pickled_copy_draws_the_same_views(ratio: Any) -> None:
    sanm, net = SANM(mu=0.5, seed=0, ratio=ratio), Small()
    sanm.build(net, SIZE)
    copied = pickle.loads(pickle.dumps(sanm))
    images, targets, quality = batch()
    assert torch.equal(sanm(net, images, targets, quality).images, copied(net, images, targets, quality).images)


class TestResume:
    @pytest.mark.parametrize("rebuilt", [True, False])
    def test_goes_on_with_the_draws_and_the_decoder_it_stopped_with(self, rebuilt: bool) -> None:
        sanm, net = built()
        images, targets, quality = batch()
        for _ in range(3):
            sanm(net, images, targets, quality)
        for parameter in sanm.decoder.parameters():
            parameter.data.normal_()
        resumed = built()[0] if rebuilt else SANM(seed=3)
        resumed.load_state_dict(saved_and_loaded(sanm.state_dict()))
        assert same(sanm(net, images, targets, quality), resumed(net, images, targets, quality))
        features = random(6, 6, 4, 4)
        assert torch.equal(sanm.reconstruction(features, images), resumed.reconstruction(features, images))

    def test_counts_the_steps_before_the_first_mask(self) -> None:
        (one, net), (other, _) = built(), built()
        images, targets, quality = batch()
        one(net, images, targets, None)
        assert not torch.equal(one(net, images, targets, quality).images, other(net, images, targets, quality).images)

    def test_builds_no_decoder_that_was_switched_off(self) -> None:
        sanm = SANM(reconstruct=False)
        sanm.load_state_dict(SANM().state_dict())
        assert sanm.decoder is None

    def test_without_a_decoder_in_the_state_waits_for_build(self) -> None:
        sanm = SANM(seed=3)
        sanm.load_state_dict(saved_and_loaded(SANM().state_dict()))
        sanm.build(network(), SIZE)
        assert sanm.decoder is not None


class TestBuild:
    def test_makes_a_decoder_for_the_map_once(self) -> None:
        sanm, net = built()
        decoder = sanm.decoder
        assert decoder.shape == (6, 4, 4)
        assert decoder.image_size == SIZE
        sanm.build(net, SIZE)
        assert sanm.decoder is decoder

    def test_gives_each_seed_a_decoder_of_its_own(self) -> None:
        one, same_seed, other = (next(built(seed=seed)[0].decoder.parameters()) for seed in (3, 3, 4))
        assert torch.equal(one, same_seed)
        assert not torch.equal(one, other)

    def test_takes_the_precision_of_the_network(self) -> None:
        sanm, _ = built(network().to(torch.bfloat16))
        assert {p.dtype for p in sanm.decoder.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("place", ["cam", "energy"])
    def test_refuses_a_map_of_one_place(self, place: Any) -> None:
        with pytest.raises(ValueError, match=r"more than one position, got 1 x 1 .*Small on images of 4 x 4"):
            SANM(place=place).build(network(), (4, 4))

    @pytest.mark.parametrize("options", [{"place": "random"}, {"mask": False}])
    def test_takes_a_map_of_one_place_where_it_is_not_looked_at(self, options: dict[str, Any]) -> None:
        SANM(**options).build(network(), (4, 4))

    @pytest.mark.parametrize("place", ["cam", "energy"])
    def test_refuses_tokens_that_the_logits_do_not_depend_on(self, place: Any) -> None:
        net = timm.create_model("test_vit", num_classes=4, img_size=32)
        with pytest.raises(ValueError, match=r"expected logits of VisionTransformer that depend on the feature map"):
            SANM(place=place).build(net, (32, 32))

    @pytest.mark.parametrize("place", ["cam", "energy"])
    @pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_mambaout"])
    def test_serves_a_head_with_a_hidden_layer(self, name: str, place: Any) -> None:
        net = timm.create_model(name, num_classes=4).eval()
        sanm, images = SANM(place=place), random(2, 3, 64, 64)
        sanm.build(net, (64, 64))
        views = sanm(net, images, torch.eye(4)[:2], torch.zeros(2))
        assert not torch.equal(views.images, images)
        assert sanm.reconstruction(net.forward_features(views.images), images) > 0

    def test_may_be_left_out_without_reconstruction(self) -> None:
        images, targets, quality = batch()
        one, other = (SANM(seed=3, reconstruct=False) for _ in range(2))
        net = network()
        one.build(net, SIZE)
        assert same(one(net, images, targets, quality), other(net, images, targets, quality))

    def test_must_come_before_reconstruction(self) -> None:
        with pytest.raises(RuntimeError, match=r"expected a decoder of SANM, got none; call sanm.build"):
            SANM().reconstruction(random(2, 6, 4, 4), random(2, 3, 16, 16))


class TestWrongInput:
    @pytest.mark.parametrize(
        ("images", "targets"), [((6, 3, 16), (6, 4)), ((6, 3, 16, 16), (6,)), ((6, 3, 16, 16), (5, 4))]
    )
    def test_shapes_that_do_not_fit(self, images: tuple[int, ...], targets: tuple[int, ...]) -> None:
        sanm, net = built()
        with pytest.raises(ValueError, match=r"expected images \(B, C, H, W\) and targets \(B, C\).*got \("):
            sanm(net, torch.ones(images), torch.ones(targets), None)

    @pytest.mark.parametrize("shape", [(5,), (6, 1), ()])
    def test_a_quality_that_is_not_one_number_per_image(self, shape: tuple[int, ...]) -> None:
        sanm, net = built()
        images, targets, _ = batch()
        for quality in (torch.ones(shape), lambda logits: torch.ones(shape)):
            with pytest.raises(ValueError, match=r"expected quality \(B,\) = \(6,\), got \("):
                sanm(net, images, targets, quality)

    @pytest.mark.parametrize("wrong", [1.5, -0.5, float("nan")])
    def test_a_quality_that_is_no_probability(self, wrong: float) -> None:
        sanm, net = built()
        images, targets, quality = batch()
        quality[3] = wrong
        with pytest.raises(ValueError, match=r"expected label quality in \[0, 1\], got"):
            sanm(net, images, targets, quality)

    @pytest.mark.parametrize("keep_unmasked", [False, True])
    def test_features_of_other_images(self, keep_unmasked: bool) -> None:
        sanm, net = built(keep_unmasked=keep_unmasked)
        images, targets, quality = batch()
        sanm(net, images, targets, quality)
        with pytest.raises(ValueError, match="expected features of the views of 6 images, got 5 feature maps"):
            sanm.reconstruction(random(5, 6, 4, 4), images)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"mu": 1.1}, r"expected mu in \[0, 1\], got 1.1; use 0.3, the default"),
            ({"mu": float("nan")}, r"expected mu in \[0, 1\], got nan"),
            ({"delta": 0}, r"expected delta in \(0, 1\], got 0"),
            ({"delta": 1.25}, r"expected delta in \(0, 1\], got 1.25"),
            ({"beta": -1}, "expected beta >= 0, got -1"),
            ({"place": "centre"}, "expected a place among .*, got 'centre'"),
            ({"ratio": "all"}, "expected a ratio among .*, got 'all'"),
            ({"ratio": "random", "ratio_range": (0.4, 0.2)}, "expected 0 <= low <= high <= 1 in ratio_range"),
            ({"ratio": "random", "ratio_range": (0.4, 1.2)}, "expected 0 <= low <= high <= 1 in ratio_range"),
            ({"quality": "true"}, "expected quality 'estimated', 'oracle' or a QualityEstimator, got 'true'"),
            ({"evidence": "accuracy"}, "expected evidence 'loss' or 'margin', got 'accuracy'"),
            ({"history": 2.0}, "expected history 'last', 'mean' or a momentum"),
            ({"fill": "zero"}, "expected fill 'pixel' or 'channel', got 'zero'"),
            ({"warmup_epochs": -1}, "expected warmup_epochs >= 0 or null, got -1"),
        ],
    )
    def test_arguments_out_of_range(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SANM(**arguments)

    def test_options_make_the_same_module_again(self) -> None:
        sanm, net = built(mu=0.2, ratio="affine", fill="channel", keep_unmasked=True, history=0.5, seed=8)
        again = SANM(**sanm.options)
        again.build(net, SIZE)
        assert same(sanm(net, *batch()), again(net, *batch()))
        assert again.options == sanm.options

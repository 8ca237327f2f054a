"""Networks of other packages: the map at whose maximum images are masked is the one that leads to the logits."""

import copy
import logging
from typing import Any

import lightning as L
import pytest
import timm
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sanm_lightning import CrossEntropy, DivideMix, SANMCallback, SANMMixin, SimCLR
from sanm_lightning.models import Normalized, SmallCNN, create_network, load_pretrained
from sanm_lightning.sanm import SANM, class_activation_map
from sanm_lightning.sanm.activation import upsample
from sanm_lightning.sanm.feature_extractor import FeatureExtractor
from sanm_lightning.sanm.last_map import Place
from sanm_lightning.sanm.saliency import grad_cam
from tests.full import FULL
from tests.sanm.families import ALL, CLASSES, SWIN, TIMM, TORCHVISION, Family

FEW = ["timm MobileNetV3", "timm ViT, class token", "torchvision ResNet", "torchvision ViT, class token"]
"""One network of each way to the map: head of timm, blocks of timm, exact map by hooks, tokens by hooks."""
SELECTED = list(ALL) if FULL else FEW


def images_of(family: Family, count: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, family.size, family.size, generator=torch.Generator().manual_seed(seed))


def targets(count: int = 4) -> Tensor:
    return F.one_hot(torch.arange(count) % CLASSES, CLASSES).float()


def grid(features: Tensor, layout: str) -> Tensor:
    """Maps (B, D, h, w): of tokens, the last square number."""
    if layout == "maps":
        return features
    if layout == "last":
        return features.permute(0, 3, 1, 2)
    side = int(features.shape[1] ** 0.5)
    return features[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))


def slow_map(network: nn.Module, family: Family, images: Tensor) -> Tensor:
    """Grad-CAM with a sum over positions: one backward pass through the whole network, one channel at a time."""
    network = copy.deepcopy(network).eval()
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output.retain_grad()
        seen.append(output)
        return output.clone()  # DenseNet continues in place

    network.get_submodule(family.layer).register_forward_hook(keep)
    logits = network(images)
    logits.max(1).values.sum().backward()
    assert seen[-1].grad is not None
    maps, gradient = (grid(part, family.layout).detach() for part in (seen[-1], seen[-1].grad))
    out = torch.zeros(len(maps), *maps.shape[2:])
    for sample in range(len(maps)):
        for channel in range(maps.shape[1]):
            out[sample] += gradient[sample, channel].sum() * maps[sample, channel]
    return out


def built(network: Any, family: Family, **options: Any) -> SANM:
    sanm = SANM(**{"seed": 0, "batch_statistics": False, **options})
    sanm.build(network, (family.size, family.size))
    return sanm


@pytest.fixture(params=ALL)
def family(request: pytest.FixtureRequest) -> Family:
    return ALL[request.param]


class TestMap:
    def test_by_hooks_is_the_gradient_by_hand_and_is_masked_at_its_maximum(self, family: Family) -> None:
        network = family.network()
        extractor = FeatureExtractor(network, (family.size, family.size))
        sanm, images = built(extractor, family), images_of(family)
        views = sanm(extractor, images, targets(), torch.zeros(4))
        expected = upsample(slow_map(network, family, images), (family.size, family.size))
        scale = float(expected.abs().max())
        assert scale > 0
        torch.testing.assert_close(views.activation, expected, rtol=1e-3, atol=1e-4 * scale)
        assert sanm.maps.chosen is not None
        assert sanm.maps.chosen.__name__ == family.kind
        peak = views.activation.flatten(1).argmax(1)
        row, column = peak // family.size, peak % family.size
        top, bottom, left, right = views.box.unbind(1)
        assert ((top <= row) & (row <= bottom) & (left <= column) & (column <= right)).all()

    @pytest.mark.parametrize("name", TIMM)
    def test_of_a_timm_name_is_the_gradient_by_hand(self, name: str) -> None:
        family = TIMM[name]
        model, options = family.make.arguments  # type: ignore[attr-defined]
        torch.manual_seed(0)
        network = create_network(model, CLASSES, (0.0,) * 3, (1.0,) * 3, **options).eval()
        sanm, images = built(network, family), images_of(family)
        views = sanm(network, images, targets(), torch.zeros(4))
        expected = upsample(slow_map(network.network, family, images), (family.size, family.size))
        torch.testing.assert_close(views.activation, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        torch.testing.assert_close(views.logits, network.network(images).detach(), rtol=1e-4, atol=1e-5)

    def test_determines_the_logits(self, family: Family) -> None:
        extractor = FeatureExtractor(family.network().eval(), (family.size, family.size))
        images, other = images_of(family), images_of(family, seed=1)
        with torch.no_grad():
            features, logits = extractor.forward_features(images).clone(), extractor.network(images)
            between = float((extractor.network(other) - logits).abs().max())
            extractor.forward_features(other)
            again = extractor.forward_head(features)
        assert between > 0
        torch.testing.assert_close(again, logits, rtol=0, atol=0.01 * between)

    @pytest.mark.parametrize("name", [name for name, family in TIMM.items() if family.kind == "cam"])
    def test_where_it_is_exact_changes_no_bit_of_eq_1(self, name: str) -> None:
        family = TIMM[name]
        network, images = family.network().eval(), images_of(family)
        views = built(network, family)(network, images, targets(), torch.zeros(4))
        with torch.no_grad():
            features = network.forward_features(images)  # type: ignore[operator]
            classes = network.forward_head(features).argmax(1)  # type: ignore[operator]
        weight = network.get_classifier().weight.detach()  # type: ignore[operator]
        expected = class_activation_map(grid(features, family.layout), weight, classes)
        assert torch.equal(views.activation, upsample(expected, (family.size, family.size)))

    @pytest.mark.parametrize("name", FEW)
    def test_takes_no_gradient_of_a_parameter_and_leaves_no_graph(self, name: str) -> None:
        family = ALL[name]
        extractor = FeatureExtractor(family.network(), (family.size, family.size))
        sanm = built(extractor, family)
        before = copy.deepcopy(extractor.state_dict())
        views = sanm(extractor, images_of(family), targets(), torch.zeros(4))
        assert all(parameter.grad is None for parameter in extractor.parameters())
        assert all(torch.equal(before[key], value) for key, value in extractor.state_dict().items())
        assert not any(part.requires_grad for part in views if isinstance(part, Tensor))
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("name", ["timm ConvNeXt", "torchvision ViT, class token"])
    def test_in_mixed_precision_and_channels_last_is_that_in_float32(self, name: str) -> None:
        family = ALL[name]
        extractor = FeatureExtractor(family.network(), (family.size, family.size))
        sanm, images = built(extractor, family), images_of(family)
        expected = sanm(extractor, images, targets(), torch.zeros(4)).activation
        extractor.to(memory_format=torch.channels_last)
        given = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(sanm(extractor, given, targets(), torch.zeros(4)).activation, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = sanm(extractor, given, targets(), torch.zeros(4)).activation
        assert rounded.dtype == torch.float32
        similar = F.cosine_similarity(rounded.flatten(1), expected.flatten(1))
        assert (similar > 0.98).all()

    @pytest.mark.parametrize("name", ["timm ConvNeXt", "torchvision ViT, class token"])
    def test_of_a_head_of_zeros_is_found_and_leaves_the_zeros(self, name: str) -> None:
        family = ALL[name]
        network = family.network()
        head = network.heads.head if hasattr(network, "heads") else network.get_classifier()  # type: ignore[operator]
        nn.init.zeros_(head.weight)
        extractor = FeatureExtractor(network, (family.size, family.size))
        assert built(extractor, family).maps.chosen.__name__ == "grad_cam"  # type: ignore[union-attr]
        assert not head.weight.any()

    @pytest.mark.parametrize(
        ("size", "reason"),
        [
            (
                32,
                "Grad-CAM of ResNet at the output of layer3, since the output of layer4 has one position on images of 32 x 32",
            ),
            (64, "class activation map of ResNet at the output of layer4, since its head is one linear layer after"),
        ],
    )
    def test_says_why_it_is_grad_cam_where_the_last_map_has_one_position(self, size: int, reason: str) -> None:
        extractor = FeatureExtractor(tv.resnet18(num_classes=CLASSES), (size, size))
        sanm = SANM(seed=0)
        sanm.build(extractor, (size, size))
        assert sanm.maps.choice is not None
        assert sanm.maps.choice.startswith(f"masks are centered on the {reason}")


def pairs(family: Family, count: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(images_of(family, count), torch.arange(count) % CLASSES), batch_size=4)


class Plain(L.LightningModule):
    def __init__(self, family: Family) -> None:
        super().__init__()
        self.net = family.network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class WithSANM(SANMMixin, Plain):
    pass


def fit(module: L.LightningModule, family: Family, *callbacks: Any, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "callbacks": list(callbacks), **options},
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, pairs(family))
    return trainer


def fixed() -> SANM:
    return SANM(ratio="fixed", warmup_epochs=0, seed=0)


class TestTraining:
    def check(self, trainer: L.Trainer, network: nn.Module, before: dict[str, Tensor]) -> None:
        assert trainer.callback_metrics["train/masked_fraction"] > 0.1
        assert trainer.callback_metrics["train/reconstruction_loss"] > 0
        assert all(torch.isfinite(value).all() for value in network.state_dict().values())
        after = dict(network.named_parameters())
        assert any(not torch.equal(before[name], after[name]) for name in before)

    def test_with_the_callback(self, family: Family, caplog: pytest.LogCaptureFixture) -> None:
        module, callback = Plain(family), SANMCallback(fixed(), rehearse=False)
        before = {name: value.detach().clone() for name, value in module.net.named_parameters()}
        with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
            trainer = fit(module, family, callback)
        self.check(trainer, module.net, before)
        said = [line for line in caplog.messages if line.startswith("SANM: masks are centered on")]
        assert len(said) == 1
        assert ("the Grad-CAM of" if family.kind == "grad_cam" else "the class activation map of") in said[0]

    @pytest.mark.parametrize("name", SELECTED)
    def test_with_the_mixin(self, name: str) -> None:
        family = ALL[name]
        module = WithSANM(family, sanm=fixed(), sanm_rehearse=False)
        before = {name: value.detach().clone() for name, value in module.net.named_parameters()}
        self.check(fit(module, family), module.net, before)

    @pytest.mark.parametrize("name", [name for name in SELECTED if name.startswith("timm")])
    def test_with_a_method_and_a_timm_name(self, name: str) -> None:
        family = ALL[name]
        model, options = family.make.arguments  # type: ignore[attr-defined]
        sanm, size = fixed(), (family.size, family.size)
        module = CrossEntropy(CLASSES, size, network=model, network_args=options, sanm=sanm, warmup_epochs=0)
        before = {name: value.detach().clone() for name, value in module.network.named_parameters()}
        self.check(fit(module, family), module.network, before)

    @pytest.mark.parametrize("name", [name for name in SELECTED if name.startswith("torchvision")])
    def test_with_a_method_and_a_module_of_torchvision(self, name: str) -> None:
        family = ALL[name]
        module = CrossEntropy(CLASSES, (family.size, family.size), network=family.network(), sanm=fixed())
        before = {name: value.detach().clone() for name, value in module.network.named_parameters()}
        self.check(fit(module, family), module.network, before)
        images = images_of(family)
        expected = module.eval().network.network(images)
        assert torch.equal(module(images), expected)
        clone = copy.deepcopy(module)
        assert torch.equal(clone(images), expected)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at what it compiles
    @pytest.mark.parametrize("name", ["torchvision ViT, class token", *([*FEW[:3], "timm ConvNeXt"] if FULL else [])])
    def test_of_a_compiled_network_is_the_same(self, name: str) -> None:
        family = ALL[name]

        def weights(**options: Any) -> dict[str, Tensor]:
            torch.manual_seed(0)
            module = CrossEntropy(
                CLASSES, (family.size, family.size), network=family.network(), sanm=fixed(), **options
            )
            fit(module, family)
            return module.state_dict()

        plain, compiled = weights(), weights(compile_network="aot_eager" if FULL else "eager")
        assert plain.keys() == compiled.keys()
        for key in plain:
            torch.testing.assert_close(plain[key], compiled[key], rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    """Two branches that meet in the classifier: no map determines the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.cat([self.one(x).mean((2, 3)), self.two(x).relu().mean((2, 3))], 1))
        return out


class Sideways(nn.Module):
    """A last convolution, and the last pooling, that the logits do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool = nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)
        self.fc, self.unused = nn.Linear(4, CLASSES), nn.Conv2d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x).relu()
        logits: Tensor = self.fc(features.amax((2, 3)))
        self.pool(self.unused(features))
        return logits


class TestChoice:
    def test_passes_over_layers_that_the_logits_do_not_use(self) -> None:
        extractor = FeatureExtractor(Sideways(), (16, 16))
        assert extractor.place == Place("body", False)
        assert not extractor.exact

    def test_of_branches_needs_a_named_layer(self) -> None:
        with pytest.raises(
            ValueError, match=r"Branches on images of 16 x 16 can be computed; set the submodule .* layer="
        ):
            FeatureExtractor(Branches(), (16, 16))
        assert FeatureExtractor(Branches(), (16, 16), layer="two").place == Place("two", False)

    def test_of_a_layer_without_influence_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"none that depend on the output of the layer 'unused'; set an earlier"):
            FeatureExtractor(Sideways(), (16, 16), layer="unused")

    def test_refuses_an_encoder_without_classifier(self) -> None:
        encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with pytest.raises(ValueError, match=r"linear classifier whose output is the logits of Sequential, got none"):
            FeatureExtractor(encoder, (16, 16))

    def test_refuses_tokens_that_the_logits_do_not_use_without_a_wrapper(self) -> None:
        network = TIMM["ViT, class token"].network()
        with pytest.raises(
            ValueError, match=r"expected logits of VisionTransformer that depend on the feature map.*place: random"
        ):
            SANM().build(network, (64, 64))
        SANM(place="random").build(network, (64, 64))

    @pytest.mark.parametrize(("name", "size"), [("test_vit", 50), ("test_convnext", 1)])
    def test_an_image_size_that_the_network_refuses_is_named(self, name: str, size: int) -> None:
        with pytest.raises(
            ValueError, match=rf"expected an image_size that \w+ accepts, got {size} x {size} \(.+\); use"
        ):
            SANM().build(create_network(name, CLASSES), (size, size))

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError("bad allocation"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        ],
        ids=["interpreter", "device", "CPU"],
    )
    def test_exhausted_memory_is_not_reported_as_a_wrong_image_size(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def exhausted(*_: Any) -> Any:
            raise error

        network, plain = create_network("small_cnn", CLASSES, width=4), nn.Sequential(nn.Conv2d(3, 4, 3))
        monkeypatch.setattr(network, "forward_features", exhausted)
        monkeypatch.setattr(plain[0], "forward", exhausted)
        for run in (lambda: SANM().build(network, (16, 16)), lambda: FeatureExtractor(plain, (16, 16))):
            with pytest.raises(type(error)) as raised:
                run()
            assert raised.value is error

    def test_is_the_last_map_of_more_than_one_position(self) -> None:
        family = TORCHVISION["ResNet"]
        extractor = FeatureExtractor(family.network(), (32, 32))
        assert extractor.place == Place("layer3", False)
        assert not extractor.exact

    def test_without_a_feature_map_needs_none_where_none_is_used(self) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, CLASSES))
        family = TORCHVISION["ResNet"]._replace(make=lambda: network, size=8)
        with pytest.raises(ValueError, match=r"expected a feature map of more than one position.*place: random"):
            FeatureExtractor(network, (8, 8))
        fit(CrossEntropy(CLASSES, (8, 8), network=network), family)
        sanm = SANM(place="random", reconstruct=False, ratio="fixed", warmup_epochs=0)
        trainer = fit(CrossEntropy(CLASSES, (8, 8), network=copy.deepcopy(network), sanm=sanm), family)
        assert trainer.callback_metrics["train/masked_fraction"] > 0.1
        assert fit(Plain(family), family, SANMCallback(sanm)).callback_metrics["train/masked_fraction"] > 0.1


class TestMethods:
    def test_refuse_a_network_of_other_classes(self) -> None:
        with pytest.raises(
            ValueError, match=r"num_classes = 5 logits, got 3 from ResNet; create it with num_classes=5"
        ):
            CrossEntropy(5, (64, 64), network=TORCHVISION["ResNet"].network())

    def test_take_a_network_whose_first_convolution_sees_some_of_the_channels(self) -> None:
        class Split(SmallCNN):
            def forward_features(self, x: Tensor) -> Tensor:
                return super().forward_features(x[:, :2])

        network = Normalized(Split(num_classes=4, in_chans=2, width=4), (0.5,) * 3, (0.25,) * 3)
        module = CrossEntropy(4, (16, 16), network=network, sanm=SANM(mu=0.5))
        assert module.sanm.decoder is not None
        assert module.sanm.decoder.image_channels == 3

    def test_refuse_a_classifier_of_other_classes(self) -> None:
        network = create_network("small_cnn", 3, width=4).network
        del network.num_classes
        with pytest.raises(
            ValueError, match=r"num_classes = 5 logits, got 3 from SmallCNN; create it with num_classes=5"
        ):
            CrossEntropy(5, (16, 16), network=network)

    def test_take_a_network_that_ends_in_a_pooling(self) -> None:
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        module = CrossEntropy(CLASSES, (16, 16), network=network, sanm=SANM())
        assert module.network.place == Place("2", False)
        assert module.sanm.maps.chosen is grad_cam

    def test_keep_the_weights_of_a_vision_transformer_under_the_same_names(self) -> None:
        network = create_network("test_vit", CLASSES, img_size=64)
        plain = timm.create_model("test_vit", num_classes=CLASSES, img_size=64)
        assert {key.removeprefix("network.") for key in network.state_dict()} == {*plain.state_dict(), "mean", "std"}

    @pytest.mark.parametrize(
        ("name", "given", "shape"),
        [
            ("swin_tiny_patch4_window7_224", {key: SWIN[key] for key in SWIN if key != "img_size"}, (32, 4, 4)),
            ("swin_tiny_patch4_window7_224", SWIN, (32, 4, 4)),
            ("test_vit", {"dynamic_img_size": True}, (64, 2, 2)),
        ],
    )
    def test_create_a_network_of_a_fixed_input_size_for_the_size_of_the_images(
        self, name: str, given: dict[str, Any], shape: tuple[int, ...], tmp_path: Any
    ) -> None:
        module = CrossEntropy(CLASSES, (32, 32), network=name, network_args=given, sanm=fixed())
        assert module.sanm.decoder is not None
        assert module.sanm.decoder.shape == shape
        trainer = fit(module, TIMM["ViT, class token"]._replace(size=32))
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        again = CrossEntropy.load_from_checkpoint(tmp_path / "c.ckpt", weights_only=True)
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(again.eval()(images), module.eval()(images))
        assert torch.equal(load_pretrained(checkpoint=tmp_path / "c.ckpt")(images), module(images))

    def test_of_two_networks_copy_a_network_with_its_hooks(self) -> None:
        family = TORCHVISION["MobileNetV3"]
        module = DivideMix(CLASSES, image_size=(family.size, family.size), network=family.network(), sanm=SANM())
        images = images_of(family)
        one, two = (network.forward_features(images) for network in module.networks)
        assert one is module.network.features
        assert two is module.network2.features
        assert not torch.allclose(one, two)

    @pytest.mark.parametrize("name", ["timm MobileNetV3", "torchvision MobileNetV3", "timm ViT, class token"])
    def test_project_the_features_before_the_classifier(self, name: str) -> None:
        family = ALL[name]
        network = family.network()
        if name == "timm ViT, class token":
            network = create_network("test_vit", CLASSES, img_size=64)
        module = SimCLR(CLASSES, image_size=(family.size, family.size), network=network)
        features = module.network.forward_features(images_of(family))
        pooled = module.network.forward_head(features, pre_logits=True)
        logits = module.network.forward_head(features)
        assert module.projection(pooled).shape[0] == 4
        torch.testing.assert_close(module.network.get_classifier().eval()(pooled), logits)


def test_torchvision_offers_the_places_of_the_table() -> None:
    """The table names layers of small instances; those of the published sizes are the same."""
    for name, layer in (("resnet18", "layer4"), ("convnext_tiny", "features"), ("swin_t", "permute")):
        with torch.device("meta"):
            assert layer in dict(getattr(tv, name)().named_modules())

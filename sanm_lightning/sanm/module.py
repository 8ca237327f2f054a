"""SANM as one module: hyper-parameters, decoder and label quality, with two calls per training step."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sanm_lightning.random_streams import named_generator, named_seed, process_rank
from sanm_lightning.sanm.activation import Backbone, feature_map, quantize, upsample
from sanm_lightning.sanm.image_scale import ImageScale
from sanm_lightning.sanm.labels import regularize_labels
from sanm_lightning.sanm.masking import (
    RATIO_RANGES,
    Ratio,
    RatioName,
    apply_mask,
    mask_box,
    masked_fraction,
    resolve_ratio,
)
from sanm_lightning.sanm.normalization import Normalization
from sanm_lightning.sanm.options import check_ranges, created_from, path_of, plain
from sanm_lightning.sanm.quality import LabelQuality, QualityEstimator, resolve_quality
from sanm_lightning.sanm.quality_source import QualitySource
from sanm_lightning.sanm.reconstruction import Decoder, reconstruction_loss
from sanm_lightning.sanm.saliency import (
    ActivationMaps,
    FrozenNetwork,
    NetworkOutput,
    Saliency,
    cam,
    energy,
    resolve_saliency,
)
from sanm_lightning.sanm.views import Quality, Views

__all__ = ["SANM", "FrozenNetwork", "Quality", "Views"]


class SANM(QualitySource, ImageScale):
    """Self-supervised Adversarial Noisy Masking, for use with any method for learning with noisy labels.

    Source: SANM (Tu et al., CVPR 2023), Algorithm 1. Two calls in a training step::

        views = sanm(network, images, targets, quality)            # steps 3 to 5 and 7
        ...the method's own loss on views.images and views.targets...   # steps 6 and 8
        loss = loss + sanm.reconstruction(features, images)        # steps 9 and 10; features of views.images

    and :meth:`build` once before training. Details that the paper does not specify are arguments.

    Args:
        mu: basic mask ratio, the masked fraction of the area for a label of quality 0, in [0, 1].
        delta: bound of the box's aspect, height over width ~ U(delta, 1 / delta), in (0, 1].
        beta: weight of the reconstruction loss, >= 0.
        mask: whether to mask image regions (AMG).
        labels: whether to soften labels (NLR).
        reconstruct: whether to reconstruct the images (SMR); False creates no decoder.
        place: center of the mask: ``"cam"``, the maximum of the class activation map of the predicted class (Eq. 1), which
            is exact for one linear layer after global average pooling; for other heads and for tokens, that of Grad-CAM
            (Selvaraju et al., ICCV 2017), of which it is the special case; ``"energy"``, that of the squared features
            (released code); ``"random"``; a :class:`FrozenNetwork`; or a callable (``sanm.saliency.Saliency``).
        ratio: masked fraction: ``"noise_aware"``, mu (1 - G) (Eq. 2); ``"fixed"``, mu; ``"random"``, U(low, high);
            ``"two_level"``, low for G >= .5, else high; ``"affine"``, U(low, high) + mu (1 - G) (released code);
            ``"shuffled"``, mu (1 - G) of another image; or a callable, see :data:`~sanm_lightning.sanm.masking.Ratio`.
        ratio_range: low, high of random, two_level and affine; None: the published values (.2, .4), (.2, .3), (.02, .07).
        quality: None or ``"estimated"``: the method's estimate if it has one, else :class:`LabelQuality` on the
            network's losses; ``"oracle"``: the true labels, an upper bound for studies; or a :class:`QualityEstimator`,
            which overrides the method's estimate. The estimator is copied.
        evidence, history: those of :class:`LabelQuality`.
        fill: ``"pixel"`` or ``"channel"``, see :func:`apply_mask`.
        anchor: place of the box: ``"center"`` (Eq. 4), ``"corner"`` (released code) or ``"inside"``, see :func:`mask_box`.
        regions: ``"peak"`` masks the map's maximum; ``"peak_and_trough"`` (released code) creates two copies of each
            image with the same ratio, aspect and targets, one masked at the maximum and one at the minimum. The
            reconstruction loss is the mean over copies, that of the released code their sum: double ``beta`` for its weight.
        area: fraction of the ratio that a box masks, in (0, 1]; labels are softened by the whole ratio. Released code: .5.
        spread: classes that receive the label's probability: ``"all"`` (Eq. 7), ``"others"`` (released code) or
            ``"smoothing"``, see :func:`regularize_labels`.
        scale: scale of fill and reconstruction: ``"unit"``, images in [0, 1], or ``"normalized"``, images as the network
            receives them (released code), in which the reconstruction loss is larger by 1 / std^2 and the fill U(0, 1) is
            brighter than the mean of the images.
        map_levels: number of levels to which an activation map is quantized before its extremes are found, the first of
            ties; None uses the map as it is. Released code: 256.
        batch_statistics: whether batch norm uses batch statistics in the pass over the unmasked images, as in the
            released code, whose network is in training mode; False uses running statistics, which are those of masked
            images and lag behind (results/README.md). The pass never updates running statistics.
        keep_unmasked: whether to train on the unmasked images and their given labels in addition to the masked images.
            Departure: the paper trains on masked images only.
        warmup_epochs: epochs before the first mask; None uses the method's warm-up. In the first epoch, every label has
            quality 1, and the ratio "noise_aware" masks nothing.
        seed: seed of boxes, fills and decoder weights; None uses torch's initial seed.

    Raises:
        ValueError: if an argument is out of its range.
    """

    owner: object = None
    """Identifies the last module that was created with this SANM; None if there is none."""

    def __init__(
        self,
        mu: float = 0.3,
        delta: float = 0.8,
        beta: float = 0.02,
        mask: bool = True,
        labels: bool = True,
        reconstruct: bool = True,
        place: Literal["cam", "energy", "random"] | FrozenNetwork | Callable[[NetworkOutput], Tensor] = "cam",
        ratio: RatioName | Callable[..., Tensor] = "noise_aware",
        ratio_range: tuple[float, float] | None = None,
        quality: QualityEstimator | Literal["estimated", "oracle"] | None = None,
        evidence: Literal["loss", "margin"] = "loss",
        history: Literal["last", "mean"] | float = "last",
        fill: Literal["pixel", "channel"] = "pixel",
        anchor: Literal["center", "corner", "inside"] = "center",
        regions: Literal["peak", "peak_and_trough"] = "peak",
        area: float = 1.0,
        spread: Literal["all", "others", "smoothing"] = "all",
        scale: Literal["unit", "normalized"] = "unit",
        map_levels: int | None = None,
        batch_statistics: bool = True,
        keep_unmasked: bool = False,
        warmup_epochs: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        default = RATIO_RANGES.get(ratio, (0.0, 1.0)) if isinstance(ratio, str) else (0.0, 1.0)
        low, high = ratio_range if ratio_range is not None else default
        self.saliency: Saliency = resolve_saliency(place)
        self.place = place if isinstance(place, str) else self.saliency
        self.maps = ActivationMaps(self.saliency if mask else None)
        estimator = resolve_quality(quality)
        self.options: dict[str, Any] = {
            "mu": mu, "delta": delta, "beta": beta, "mask": mask, "labels": labels, "reconstruct": reconstruct,
            "place": plain(self.place), "ratio": plain(ratio), "evidence": evidence, "history": history,
            "ratio_range": None if ratio_range is None else [low, high], "fill": fill, "anchor": anchor,
            "quality": (quality or "estimated") if estimator is None else estimator.options, "regions": regions,
            "area": area, "spread": spread, "scale": scale,
            "map_levels": map_levels, "batch_statistics": batch_statistics, "keep_unmasked": keep_unmasked,
            "warmup_epochs": warmup_epochs, "seed": seed,
        }  # fmt: skip
        """The arguments as built-in types, for checkpoints; subclasses add theirs."""
        check_ranges(low, high, self.options)
        self.ratio_of: Ratio = resolve_ratio(ratio, mu, low, high)
        self.mu, self.delta, self.beta = mu, delta, beta
        self.mask, self.labels, self.reconstruct = mask, labels, reconstruct and beta > 0
        self.ratio, self.ratio_range = ratio, (low, high)
        self.quality = "estimated" if quality is None else quality if isinstance(quality, str) else "given"
        self.fill, self.keep_unmasked, self.warmup_epochs = fill, keep_unmasked, warmup_epochs
        self.batch_statistics = batch_statistics
        self.anchor, self.regions, self.area, self.spread = anchor, regions, area, spread
        self.scale, self.map_levels = scale, map_levels
        self.seed = torch.initial_seed() if seed is None else seed
        self.label_quality: QualityEstimator = LabelQuality(evidence, history) if estimator is None else estimator
        self.decoder: Decoder | None = None
        self.built = False
        """Whether :meth:`build` was called for a network, to which this SANM then belongs."""
        self.normalization = None  # of the images that `forward` and `reconstruction` receive
        self.network_normalization = None  # set by `build`
        self.last: dict[str, Tensor] = {}
        """Metrics of the last step, scalars without gradient: quality, masked_fraction, reconstruction_loss."""
        self._steps = 0
        self._views: Views | None = None  # of the last call, for `reconstruction` without views

    @classmethod
    def off(cls) -> "SANM":
        """Return a disabled SANM, which leaves the base method unchanged."""
        return cls(mask=False, labels=False, reconstruct=False)

    @staticmethod
    def from_options(options: dict[str, Any]) -> "SANM":
        """Create a SANM from the options in a checkpoint: arguments, or class path and arguments of a subclass.

        Raises:
            ValueError: if the class path is not that of a subclass of SANM.
        """
        return cast("SANM", created_from(SANM, options))

    @property
    def saved_options(self) -> dict[str, Any]:
        """Options for :meth:`from_options`."""
        if type(self) is SANM:
            return self.options
        return {"class_path": path_of(type(self)), "init_args": self.options}

    def peer_copy(self, seed: int) -> "SANM":
        """Return a copy for a second network, with the same class and options, and a separate decoder and estimator.

        Args:
            seed: seed of boxes, fills and decoder weights. The decoder is created by :meth:`build`. A frozen network is
                shared.
        """
        twin = copy.deepcopy(self, {id(self.saliency): self.saliency})
        twin.seed, twin.decoder, twin.built = seed, None, False
        return twin

    @property
    def softens_labels(self) -> bool:
        """Whether labels are changed after the warm-up, without a look at their quality."""
        return self.labels and not self._never

    @property
    def hides_images(self) -> bool:
        """Whether images are changed after the warm-up, without a look at label quality."""
        return self.mask and not self._never

    @property
    def _never(self) -> bool:
        return self.mu == 0 and self.ratio in ("noise_aware", "fixed", "shuffled")

    @property
    def enabled(self) -> bool:
        """Whether any of the three parts is enabled."""
        return self.mask or self.labels or self.reconstruct

    @property
    def needs_map(self) -> bool:
        """Whether a feature map is used, by the masks or the decoder."""
        return self.reconstruct or (self.mask and self.saliency in (cam, energy))

    def build(self, network: Backbone, image_size: tuple[int, int]) -> None:
        """Create the decoder for the feature map of ``network``, and check that the network supports SANM.

        Call it before the optimizer is created; further calls have no effect.

        Args:
            network: network with timm's interface, on any device.
            image_size: H, W of the training images in pixels.

        Raises:
            ValueError: if the network has no feature map or, for masks at its maximum, a map of one position or one on
                which the logits do not depend; or its maps and images do not have the channels of an existing decoder.
        """
        if not self.enabled:
            return
        output = self.maps.build(network, image_size, named_generator("probe", self.seed))
        if self.reconstruct and self.decoder is None:
            self._create_decoder(output.maps.shape[1:], image_size, output.images.shape[1])
        if self.decoder is not None:
            self.decoder.check_channels(output.maps.shape[1], output.images.shape[1])
        if self.scale == "normalized" and self.normalization is None:
            self.network_normalization = Normalization.of_network(network)
        self.to(output.logits.device, output.logits.dtype)
        self.built = True

    def masking(self, epoch: int, method_warmup: int = 0) -> bool:
        """Return whether images are masked in ``epoch``, given the method's number of warm-up epochs."""
        return self.enabled and epoch >= (method_warmup if self.warmup_epochs is None else self.warmup_epochs)

    def forward(
        self,
        network: Backbone,
        images: Tensor,
        targets: Tensor,
        quality: Quality,
        features: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Views:
        """Compute the training views, without gradient and without changes of batch-norm statistics or global streams.

        Source: SANM, Algorithm 1, steps 3 to 5 and 7.

        Args:
            network: the trained network, with timm's interface.
            images: shape (B, C, H, W), floating, in [0, 1], or normalized by ``normalization``.
            targets: class probabilities, shape (B, C).
            quality: label quality G, shape (B,), in [0, 1]; or a function that computes it from the logits (B, C) of
                the unmasked images; or None before the first mask.
            features: features of the unmasked images, shape (B, D, h, w), if available; this saves a pass over the
                backbone.
            generator: random generator of boxes and fills, on the device of the images; None uses a stream named by
                seed, process and number of the call.

        Returns:
            The views.

        Raises:
            ValueError: if shapes do not match, or a quality is outside [0, 1] (on other devices than the CPU, raised at
                the next fit of the quality).
        """
        if images.ndim != 4 or targets.ndim != 2 or len(images) != len(targets):
            raise ValueError(
                "expected images (B, C, H, W) and targets (B, C) as class probabilities, got "
                f"{tuple(images.shape)} and {tuple(targets.shape)}"
            )
        self._steps += 1
        self.last = {}
        if quality is None or not self.enabled:
            self._views = Views(images, targets)
            return self._views
        if generator is None:
            generator = named_generator("mask", self.seed, process_rank(), self._steps, device=images.device)
        output, maps = None, None
        if self.mask or callable(quality):
            output, maps = self.maps(network, images, features, generator, self.batch_statistics, self.in_unit_range)
        with torch.no_grad():
            known = quality(output.logits) if callable(quality) and output is not None else cast(Tensor, quality)
            if known.shape != images.shape[:1]:
                raise ValueError(f"expected quality (B,) = ({len(images)},), got {tuple(known.shape)}")
            self._check_later(known)
            ratio = self.ratio_of(known, generator=generator)
            softened = regularize_labels(targets, ratio, spread=self.spread) if self.labels else targets
            masked, box, activation = images, None, None
            if maps is not None:
                activation = upsample(maps, (images.shape[2], images.shape[3]))
                if self.map_levels is not None:
                    activation = quantize(activation, self.map_levels)
                masked, box = self._masked(images, activation, ratio, generator)
                softened = softened.repeat(len(masked) // len(images), 1)
                self.last["masked_fraction"] = masked_fraction(box, (images.shape[2], images.shape[3])).mean()
            self.last["quality"] = known.mean()
            if self.keep_unmasked:
                masked, softened = torch.cat([images, masked]), torch.cat([targets, softened])
        seen = (None, None) if output is None else (output.logits, output.features)
        self._views = Views(masked, softened, ratio, box, activation, *seen)
        return self._views

    def reconstruction(self, features: Tensor, images: Tensor, views: Views | None = None) -> Tensor:
        """Return beta times the reconstruction loss of the images from the features of their masked views.

        Source: SANM, Eq. 9 and 10, Algorithm 1, steps 9 and 10. Before the first mask, the decoder is used with weight
        0, because DistributedDataParallel does not support unused parameters.

        Args:
            features: features of the views' images, from the training forward pass, shape (V, D, h, w), with gradient;
                several masked copies of the batch may be concatenated.
            images: the unmasked images, shape (B, C, H, W).
            views: output of :meth:`forward`; None uses that of its last call.

        Returns:
            A scalar; 0 without masked views.

        Raises:
            RuntimeError: if :meth:`build` was not called.
            ValueError: if the number of features does not match the images.
        """
        views, self._views = views or self._views, None
        if not self.reconstruct:
            return features.new_zeros(())
        if self.decoder is None:
            raise RuntimeError(
                "expected a decoder of SANM, got none; call sanm.build(network, image_size) before the optimizer is "
                "created"
            )
        if views is None or not views.masked:
            return 0.0 * torch.stack([parameter.sum() for parameter in self.decoder.parameters()]).sum()
        masked = features[len(images) :] if self.keep_unmasked else features
        copies, rest = divmod(len(masked), len(images))
        if rest or not copies:
            raise ValueError(
                f"expected features of the views of {len(images)} images, got {len(features)} feature maps; run the network "
                "once on all images of the batch, or use reconstruct=False"
            )
        painted = self.decoder(feature_map(masked, self.decoder.shape[0], images.shape[2:]))
        target = self.reconstruction_target(images)
        loss = reconstruction_loss(painted, target.repeat(copies, 1, 1, 1) if copies > 1 else target)
        self.last["reconstruction_loss"] = loss.detach()
        return self.beta * loss

    def _masked(
        self, images: Tensor, activation: Tensor, ratio: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return masked copies of the images, and their boxes."""
        drawn = torch.rand(ratio.shape, generator=generator, device=ratio.device)
        aspect = self.delta + (1 / self.delta - self.delta) * drawn  # delta_i ~ U(delta, 1 / delta), Eq. 3
        extremes = [activation] if self.regions == "peak" else [activation, -activation]
        boxes = [mask_box(extreme, self.area * ratio, aspect, anchor=self.anchor) for extreme in extremes]
        box, copied = torch.cat(boxes), images if len(boxes) == 1 else images.repeat(len(boxes), 1, 1, 1)
        return apply_mask(copied, box, fill=self.fill, generator=generator, normalize=self.scaled_fill), box

    def rebuild(self, features: Tensor, image_size: Sequence[int]) -> Tensor:
        """Return the decoder's images (B, C, H, W) in [0, 1] from features of masked images of a size, for pictures."""
        assert self.decoder is not None
        return self.displayed(self.decoder(feature_map(features, self.decoder.shape[0], image_size)))

    def _create_decoder(self, shape: Sequence[int], image_size: Sequence[int], image_channels: int = 3) -> None:
        seed, map_size, size = named_seed("decoder", self.seed), (shape[1], shape[2]), (image_size[0], image_size[1])
        self.decoder = Decoder(shape[0], map_size, size, seed, image_channels)

    def get_extra_state(self) -> dict[str, Any]:
        """Return seed and step counter, which identify the random streams, and the shape of the decoder."""
        decoder = None if self.decoder is None else self.decoder.sizes
        return {"seed": self.seed, "steps": self._steps, "decoder": decoder}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a state; a missing decoder is created, and its weights are loaded afterwards."""
        self.seed, self._steps = state["seed"], state["steps"]
        if state["decoder"] is not None and self.decoder is None and self.reconstruct:
            self._create_decoder(*state["decoder"])  # without image channels in earlier versions

"""SANM as one module: hyper-parameters, decoder and label quality behind two calls."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from sanm_lightning.random_streams import derived_generator, derived_seed, process_rank
from sanm_lightning.sanm.activation import (
    Backbone,
    class_activation_map,
    classifier_weight,
    energy_map,
    feature_map,
    upsample,
)
from sanm_lightning.sanm.labels import regularize_labels
from sanm_lightning.sanm.masking import (
    affine_ratio,
    apply_mask,
    fixed_ratio,
    hidden_share,
    mask_box,
    mask_ratio,
    random_ratio,
    two_level_ratio,
)
from sanm_lightning.sanm.quality import LabelQuality
from sanm_lightning.sanm.reconstruction import Decoder, reconstruction_loss

__all__ = ["SANM", "FrozenNetwork", "Views", "without_trace"]

Quality = Tensor | Callable[[Tensor], Tensor] | None


class Views(NamedTuple):
    """What a method learns from in this step.

    V is B; 2B with two masked copies of each image (all at the maximum, then all at the minimum); and B more when the unmasked
    images are kept, which come first.
    """

    images: Tensor
    """(V, 3, H, W), floating."""
    targets: Tensor
    """(V, C), class probabilities."""
    ratio: Tensor | None = None
    """(B,), the asked share of hidden area; None before the first mask."""
    box: Tensor | None = None
    """(B, 4), or (2B, 4) with two masked copies: up, down, left, right in pixels; None where nothing was hidden."""
    activation: Tensor | None = None
    """(B, H, W), the map whose maximum was hidden; None where nothing was hidden."""
    logits: Tensor | None = None
    """(B, C), of the unmasked images, without gradient; None where no extra pass was made."""

    def unmasked(self, logits: Tensor) -> Tensor:
        """Return the logits of the unmasked images: of the extra pass, or, where nothing was masked, ``logits`` (B, C)."""
        if self.logits is not None:
            return self.logits
        return logits if self.ratio is None else logits[: len(self.ratio)]  # kept unmasked images come first

    def rows(self, chosen: Tensor, batch_size: int) -> Tensor:
        """Return the rows of all views of the images ``chosen``, (K,) positions in a batch of ``batch_size``: (K V / B,)."""
        return torch.cat([chosen + first for first in range(0, len(self.images), batch_size)])


@contextlib.contextmanager
def without_trace(network: Any, images: Tensor, batch_statistics: bool = False) -> Iterator[None]:
    """Run ``network`` as in evaluation, without gradient, leaving modes, statistics, streams and caches as they were.

    Args:
        network: the network that is going to be run; its ``modules()`` are looked at.
        images: what it is going to be run on; their device counts.
        batch_statistics: let batch norm use the statistics of this batch, as in training, in place of the running ones.

    The cache is autocast's: a weight cast to bf16 without gradient would be served again to the training forward, and its
    gradient would be lost.
    """
    training = [module for module in network.modules() if module.training] if hasattr(network, "modules") else []
    norms = [m for m in training if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    device = images.device
    flag = object.__setattr__  # a module's own looks for parameters first: a third of a mask's time for a ResNet-18
    for module in training:
        flag(module, "training", False)
    if batch_statistics:
        for norm in norms:  # in training mode but without tracking: the batch's own statistics, and no update
            flag(norm, "training", True)
            flag(norm, "track_running_stats", False)
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(
                device.type,
                dtype=torch.get_autocast_dtype(device.type),
                enabled=torch.is_autocast_enabled(device.type),
                cache_enabled=False,
            ),
        ):
            yield
    finally:
        for module in training:
            flag(module, "training", True)
        for norm in norms:
            flag(norm, "track_running_stats", True)


class FrozenNetwork:
    """Look with another network than the one in training: a pre-trained timm model that never changes.

    Source: SANM, Table 4 ("masks from pre-trained backbones").

    Images are resized to the model's own input size and normalised with its own statistics. It is not a part of the module
    that uses it: no parameters, nothing in checkpoints.

    Args:
        name: timm model name with a linear head after global pooling, as ``resnet50``.
        pretrained: load timm's weights (a download on first use); False only makes sense with ``checkpoint``, or in tests.
        checkpoint: a file of weights for ``name`` in place of timm's own.
    """

    def __init__(self, name: str, pretrained: bool = True, checkpoint: str | None = None) -> None:
        self.options = {"name": name, "pretrained": pretrained, "checkpoint": checkpoint}
        with torch.random.fork_rng(devices=[]):
            self.network: Any = timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint or "")
        self.network.eval().requires_grad_(False)
        config = resolve_data_config({}, model=self.network)
        self.size = tuple(config["input_size"][1:])
        self.mean = torch.tensor(config["mean"]).view(3, 1, 1)
        self.std = torch.tensor(config["std"]).view(3, 1, 1)
        self(torch.zeros(1, 3, *self.size))  # a network that cannot do it says so now, not after the warm-up

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> activation map (B, h, w) of the class that the frozen network sees."""
        self.network.to(images.device)
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)  # moved once: a copy would wait
        resized = F.interpolate(images.float(), size=self.size, mode="bilinear", align_corners=False, antialias=True)
        normalised = (resized - self.mean) / self.std
        features = self.network.forward_features(normalised)
        maps = feature_map(features, self.network.num_features)
        classes = self.network.forward_head(features).argmax(1)
        return class_activation_map(maps, classifier_weight(self.network, maps.shape[1]), classes)


class SANM(nn.Module):
    """Self-supervised Adversarial Noisy Masking, laid over any method for learning with noisy labels.

    Source: SANM (Tu et al., CVPR 2023), Algorithm 1. Two calls in a training step::

        views = sanm(network, images, targets, quality)            # steps 3 to 5 and 7
        ...the method's own loss on views.images and views.targets...   # steps 6 and 8
        loss = loss + sanm.reconstruction(features, images)        # steps 9 and 10; features of views.images

    and :meth:`build` once before training. What the paper leaves open is an argument here.

    Args:
        mu: basic mask ratio, the share of the area hidden when a label is surely wrong, in [0, 1].
        delta: bound of the box's aspect, height over width ~ U(delta, 1 / delta), in (0, 1].
        beta: weight of the reconstruction loss, >= 0.
        mask: hide image regions (AMG); False leaves images as they are.
        labels: soften labels (NLR); False leaves targets as they are.
        reconstruct: learn to reconstruct (SMR); False builds no decoder.
        place: where to hide: ``"cam"``, the maximum of the class activation map of the predicted class (Eq. 1);
            ``"energy"``, of the squared features (released code); ``"random"``; or a :class:`FrozenNetwork`.
        ratio: how much to hide: ``"noise_aware"``, mu (1 - G) (Eq. 2); ``"fixed"``, mu; ``"random"``, U(low, high);
            ``"two_level"``, low for G >= .5, else high; ``"affine"``, U(low, high) + mu (1 - G) (released code).
        ratio_range: low, high of the last three; None means what was published: (.2, .4), (.2, .3), (.02, .07).
        quality: ``"estimated"`` from the network's own losses, or ``"oracle"``: the true labels, an upper bound for
            studies, useless in practice.
        evidence: what the estimate is made of, see :class:`LabelQuality`.
        history: over which epochs, see :class:`LabelQuality`.
        fill: ``"pixel"`` or ``"channel"``, see :func:`apply_mask`.
        anchor: whether the maximum is the box's ``"center"`` (Eq. 4) or ``"corner"`` (released code), see :func:`mask_box`.
        regions: ``"peak"`` hides at the map's maximum; ``"peak_and_trough"`` (released code) makes two copies of each image,
            one with a box at the maximum and one at the minimum, of one ratio and aspect, with the same targets. The
            reconstruction loss is the mean over copies, where the released code has their sum: double ``beta`` for its weight.
        area: share of the ratio that a box hides, in (0, 1]; the label moves by the whole ratio. 1/2 in the released code.
        spread: which classes the label's probability moves to, ``"all"`` (Eq. 7) or ``"others"`` (released code).
        batch_statistics: let batch norm use the batch's own statistics in the pass over the unmasked images (as the released
            code does, whose network is in training mode there); False uses the running ones. Those come from masked images
            only, and lag: on digits with half of the labels wrong, the test accuracy in mid-training of a first version of our
            PreAct ResNet was .25 with them and .76 with statistics of unmasked images (one run). Either way no statistic is
            updated.
        keep_unmasked: learn from the unmasked images and their given labels beside the masked ones. Departure: the paper
            learns from the masked ones only.
        warmup_epochs: epochs before the first mask; None means the method's own warm-up. In the first epoch nothing is known
            of any label, every label is trusted, and with the ratio "noise_aware" nothing is hidden.
        seed: seed of boxes, fills and decoder weights; None takes the one torch was seeded with.

    Raises:
        ValueError: if an argument is out of its range.
    """

    _ranges = {"random": (0.2, 0.4), "two_level": (0.2, 0.3), "affine": (0.02, 0.07)}

    def __init__(
        self,
        mu: float = 0.3,
        delta: float = 0.8,
        beta: float = 0.02,
        mask: bool = True,
        labels: bool = True,
        reconstruct: bool = True,
        place: Literal["cam", "energy", "random"] | FrozenNetwork = "cam",
        ratio: Literal["noise_aware", "fixed", "random", "two_level", "affine"] = "noise_aware",
        ratio_range: tuple[float, float] | None = None,
        quality: Literal["estimated", "oracle"] = "estimated",
        evidence: Literal["loss", "margin"] = "loss",
        history: Literal["last", "mean"] | float = "last",
        fill: Literal["pixel", "channel"] = "pixel",
        anchor: Literal["center", "corner"] = "center",
        regions: Literal["peak", "peak_and_trough"] = "peak",
        area: float = 1.0,
        spread: Literal["all", "others"] = "all",
        batch_statistics: bool = True,
        keep_unmasked: bool = False,
        warmup_epochs: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(place, dict):  # the options of a SANM whose place was a frozen network
            place = FrozenNetwork(**place["init_args"])
        low, high = ratio_range if ratio_range is not None else self._ranges.get(ratio, (0.0, 1.0))
        for name, value in (("mu", mu), ("delta", delta), ("beta", beta), ("area", area)):
            _require(isinstance(value, (int, float)), f"a number as {name}", value)
        _require(0 <= mu <= 1, "mu in [0, 1]", mu)
        _require(0 < delta <= 1, "delta in (0, 1]", delta)
        _require(beta >= 0, "beta >= 0", beta)
        _require(isinstance(place, FrozenNetwork) or place in ("cam", "energy", "random"), "a known place", place)
        _require(ratio in ("noise_aware", "fixed", *self._ranges), "a known ratio", ratio)
        _require(0 <= low <= 1 and 0 <= high <= 1 and low <= high, "0 <= low <= high <= 1 in ratio_range", (low, high))
        _require(quality in ("estimated", "oracle"), "quality 'estimated' or 'oracle'", quality)
        _require(fill in ("pixel", "channel"), "fill 'pixel' or 'channel'", fill)
        _require(anchor in ("center", "corner"), "anchor 'center' or 'corner'", anchor)
        _require(regions in ("peak", "peak_and_trough"), "regions 'peak' or 'peak_and_trough'", regions)
        _require(0 < area <= 1, "area in (0, 1]", area)
        _require(spread in ("all", "others"), "spread 'all' or 'others'", spread)
        _require(warmup_epochs is None or warmup_epochs >= 0, "warmup_epochs >= 0 or null", warmup_epochs)
        self.mu, self.delta, self.beta = mu, delta, beta
        self.mask, self.labels, self.reconstruct = mask, labels, reconstruct and beta > 0
        self.place, self.ratio, self.ratio_range = place, ratio, (low, high)
        self.quality, self.fill, self.keep_unmasked, self.warmup_epochs = quality, fill, keep_unmasked, warmup_epochs
        self.batch_statistics = batch_statistics
        self.anchor, self.regions, self.area, self.spread = anchor, regions, area, spread
        self.seed = torch.initial_seed() if seed is None else seed
        self.label_quality = LabelQuality(evidence, history)
        self.decoder: Decoder | None = None
        self.last: dict[str, Tensor] = {}
        """Figures of the last step, scalars without gradient: quality, hidden_share, reconstruction_loss."""
        self._steps = 0
        self._idle = True
        frozen = {"class_path": "sanm_lightning.sanm.FrozenNetwork", "init_args": getattr(place, "options", None)}
        self.options: dict[str, Any] = {
            "mu": mu, "delta": delta, "beta": beta, "mask": mask, "labels": labels, "reconstruct": reconstruct,
            "place": place if isinstance(place, str) else frozen, "ratio": ratio,
            "ratio_range": None if ratio_range is None else [low, high], "quality": quality, "evidence": evidence,
            "history": history, "fill": fill, "anchor": anchor, "regions": regions, "area": area, "spread": spread,
            "batch_statistics": batch_statistics, "keep_unmasked": keep_unmasked,
            "warmup_epochs": warmup_epochs, "seed": seed,
        }  # fmt: skip
        """The arguments as plain Python, for a checkpoint."""

    @classmethod
    def off(cls) -> "SANM":
        """Return a SANM that hands back what it is given: the plain base method."""
        return cls(mask=False, labels=False, reconstruct=False)

    @property
    def enabled(self) -> bool:
        """Whether any of the three parts is on."""
        return self.mask or self.labels or self.reconstruct

    def build(self, network: Backbone, image_size: tuple[int, int]) -> None:
        """Look once at ``network``: build the decoder for its feature map, and refuse a network that has no CAM.

        Call it before the optimizer is made; a second call changes nothing.

        Args:
            network: by timm's conventions, on any device.
            image_size: H, W of the training images in pixels.

        Raises:
            ValueError: if the network yields no feature map, a map of one place, or (place cam) no class activation map.
        """
        if not self.enabled:
            return
        module = network if isinstance(network, nn.Module) else None
        like = next(module.parameters(), torch.zeros(())) if module is not None else torch.zeros(())
        generator = derived_generator(torch.device("cpu"), self.seed)
        try:
            images = torch.rand(2, 3, *image_size, generator=generator).to(like.device, like.dtype)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"expected an image_size that fits in memory, got {image_size[0]} x {image_size[1]}"
            ) from error
        with without_trace(network, images):
            output = network.forward_features(images)
            features = feature_map(output, network.num_features)
            logits = network.forward_head(output)
        channels, *map_size = features.shape[1:]
        if self.mask and self.place == "cam":
            _require_pooled_linear(network, features, logits)
        if self.mask and self.place in ("cam", "energy") and map_size[0] * map_size[1] == 1:
            raise ValueError(
                f"a feature map of 1 x 1 cannot say where the network looks ({type(network).__name__} on images of "
                f"{image_size[0]} x {image_size[1]}); use a larger image_size, a network of smaller stride, or place: random"
            )
        if self.reconstruct and self.decoder is None:
            self._build_decoder(channels, (map_size[0], map_size[1]), image_size)
        self.to(like.device, like.dtype)

    def masking(self, epoch: int, method_warmup: int = 0) -> bool:
        """Say whether masks are drawn in ``epoch``, given the method's own number of warm-up epochs."""
        return self.enabled and epoch >= (method_warmup if self.warmup_epochs is None else self.warmup_epochs)

    def source_of_quality(
        self, targets: Tensor, index: Tensor | None = None, true_labels: Tensor | None = None
    ) -> Quality:
        """Return what :meth:`forward` takes as ``quality``: the estimate, or the oracle's answer where that was asked for.

        Args:
            targets: given labels as class probabilities, shape (B, C).
            index: positions in the training set, shape (B,), or None.
            true_labels: right class indices, shape (B,), or None; read for the oracle only.

        Raises:
            ValueError: if the oracle is asked for and the batch has no true labels.
        """
        if self.quality == "oracle":
            if true_labels is None:
                raise ValueError(
                    "quality: oracle needs batches with true_labels, got none; use quality: estimated, or data whose true "
                    "labels are known"
                )
            return (targets.argmax(1) == true_labels).float()
        return lambda logits: self.label_quality(logits, targets, index)

    def forward(
        self, network: Backbone, images: Tensor, targets: Tensor, quality: Quality, features: Tensor | None = None
    ) -> Views:
        """Make the views a method learns from. No gradient, no trace in batch-norm statistics or random streams.

        Source: SANM, Algorithm 1, steps 3 to 5 and 7.

        Args:
            network: the network in training, by timm's conventions.
            images: shape (B, 3, H, W), floating, in [0, 1].
            targets: class probabilities, shape (B, C).
            quality: label quality G, shape (B,), in [0, 1]; or a function that makes it from the logits (B, C) of the
                unmasked images; or None before the first mask.
            features: of the unmasked images, shape (B, D, h, w), where the method has them; then no pass over the
                backbone is made here.

        Raises:
            ValueError: if shapes do not fit, or (on CPU; elsewhere at the next refresh) a quality is outside [0, 1].
        """
        if images.ndim != 4 or targets.ndim != 2 or len(images) != len(targets):
            raise ValueError(
                "expected images (B, 3, H, W) and targets (B, C) as class probabilities, got "
                f"{tuple(images.shape)} and {tuple(targets.shape)}"
            )
        self._steps += 1
        self.last = {}
        self._idle = quality is None or not self.enabled
        if quality is None or not self.enabled:
            return Views(images, targets)
        generator = derived_generator(images.device, self.seed, process_rank(), self._steps)
        look = self.mask or callable(quality)
        logits, maps = self._look(network, images, features, generator) if look else (None, None)
        with torch.no_grad():
            known = quality(logits) if callable(quality) and logits is not None else quality
            assert isinstance(known, Tensor)
            if known.shape != images.shape[:1]:
                raise ValueError(f"expected quality (B,) = ({len(images)},), got {tuple(known.shape)}")
            self.label_quality.look_later(known)
            ratio = self._ratio(known, generator)
            softened = regularize_labels(targets, ratio, spread=self.spread) if self.labels else targets
            masked, box, activation = images, None, None
            if self.mask and maps is not None:
                activation = upsample(maps, (images.shape[2], images.shape[3]))
                aspect = self._aspect(ratio, generator)
                extremes = [activation] if self.regions == "peak" else [activation, -activation]
                boxes = [mask_box(extreme, self.area * ratio, aspect, anchor=self.anchor) for extreme in extremes]
                box, copies = torch.cat(boxes), len(boxes)
                copied = images if copies == 1 else images.repeat(copies, 1, 1, 1)
                masked = apply_mask(copied, box, fill=self.fill, generator=generator)
                softened = softened if copies == 1 else softened.repeat(copies, 1)
                self.last["hidden_share"] = hidden_share(box, (images.shape[2], images.shape[3])).mean()
            self.last["quality"] = known.mean()
            if self.keep_unmasked:
                masked, softened = torch.cat([images, masked]), torch.cat([targets, softened])
        return Views(masked, softened, ratio, box, activation, logits)

    def reconstruction(self, features: Tensor, images: Tensor) -> Tensor:
        """Return beta times the reconstruction loss: how badly the decoder paints the images from masked features.

        Source: SANM, Eq. 9 and 10, Algorithm 1, steps 9 and 10. Before the first mask the decoder takes part with weight
        zero, or DistributedDataParallel stops on unused parameters.

        Args:
            features: of the views' images, from the forward that the method learns from, shape (V, D, h, w), with
                gradient; several masked copies of the batch may follow one another.
            images: the unmasked images, shape (B, 3, H, W).

        Returns:
            A scalar; zero where there is nothing to learn from.

        Raises:
            RuntimeError: if :meth:`build` was not called.
            ValueError: if the features do not belong to the images.
        """
        if not self.reconstruct:
            return features.new_zeros(())
        if self.decoder is None:
            raise RuntimeError(
                "SANM has no decoder yet; call sanm.build(network, image_size) before the optimizer is made"
            )
        if self._idle:
            return 0.0 * torch.stack([parameter.sum() for parameter in self.decoder.parameters()]).sum()
        masked = features[len(images) :] if self.keep_unmasked else features
        copies, rest = divmod(len(masked), len(images))
        if rest or not copies:
            raise ValueError(
                f"expected features of the views of {len(images)} images, got {len(features)} feature maps"
            )
        painted = self.decoder(feature_map(masked, self.decoder.shape[0]))
        loss = reconstruction_loss(painted, images.repeat(copies, 1, 1, 1) if copies > 1 else images)
        self.last["reconstruction_loss"] = loss.detach()
        return self.beta * loss

    def _look(
        self, network: Backbone, images: Tensor, features: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C) of the unmasked images and, where masks are drawn, activation maps (B, h, w)."""
        with without_trace(network, images, self.batch_statistics):
            features = network.forward_features(images) if features is None else features.detach()
            logits = network.forward_head(features)
            if not self.mask:
                return logits, None
            if isinstance(self.place, FrozenNetwork):
                return logits, self.place(images)
            if self.place == "random":
                size = (len(images), *images.shape[2:])
                return logits, torch.rand(size, generator=generator, device=images.device)
            maps = feature_map(features, network.num_features)
            if self.place == "energy":
                return logits, energy_map(maps)
            return logits, class_activation_map(maps, classifier_weight(network, maps.shape[1]), logits.argmax(1))

    def _ratio(self, quality: Tensor, generator: torch.Generator) -> Tensor:
        low, high = self.ratio_range
        if self.ratio == "noise_aware":
            return mask_ratio(quality, self.mu)
        if self.ratio == "fixed":
            return fixed_ratio(quality, self.mu)
        if self.ratio == "random":
            return random_ratio(quality, low, high, generator)
        if self.ratio == "two_level":
            return two_level_ratio(quality, low, high)
        return affine_ratio(quality, self.mu, low, high, generator)

    def _aspect(self, ratio: Tensor, generator: torch.Generator) -> Tensor:
        """Draw delta_i ~ U(delta, 1 / delta) (Eq. 3)."""
        drawn = torch.rand(ratio.shape, generator=generator, device=ratio.device)
        return self.delta + (1 / self.delta - self.delta) * drawn

    def _build_decoder(self, channels: int, map_size: tuple[int, int], image_size: tuple[int, int]) -> None:
        self.decoder = Decoder(channels, map_size, image_size, seed=derived_seed(self.seed))

    def get_extra_state(self) -> dict[str, Any]:
        """Return seed and step counter, which name the random streams, and the decoder's shape, so that a load can build it."""
        decoder = None if self.decoder is None else [list(self.decoder.shape), list(self.decoder.image_size)]
        return {"seed": self.seed, "steps": self._steps, "decoder": decoder}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over a state; a decoder that is in it and not here yet is built, its weights follow."""
        self.seed, self._steps = state["seed"], state["steps"]
        if state["decoder"] is not None and self.decoder is None and self.reconstruct:
            (channels, *map_size), image_size = state["decoder"]
            self._build_decoder(channels, (map_size[0], map_size[1]), (image_size[0], image_size[1]))


def _require(condition: bool, expected: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"SANM expected {expected}, got {got!r}")


@torch.no_grad()
def _require_pooled_linear(network: Backbone, maps: Tensor, logits: Tensor) -> None:
    """Refuse a network whose logits are not one linear map of the mean of its feature map: its CAM would be another's."""
    weight = classifier_weight(network, maps.shape[1])
    bias = getattr(network.get_classifier(), "bias", None)
    pooled = F.linear(maps.float().mean((2, 3)), weight.float(), None if bias is None else bias.float())
    if float((pooled - logits.float()).abs().max()) > 0.02 * float(logits.abs().max()) + 1e-3:
        raise ValueError(
            f"a class activation map needs logits that are one linear map of the averaged features, and "
            f"{type(network).__name__} does more between its last feature map and its logits; choose place: energy"
        )

"""Vision transformers of timm, divided where their logits depend on the patches."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

__all__ = ["last_block_and_head", "reads_class_token", "without_last_block"]


def reads_class_token(network: Any) -> bool:
    """Return whether a network is a vision transformer whose classifier reads the class token only.

    The output of the last block is then no feature map: the logits do not depend on its patches.
    """
    return (
        isinstance(network, VisionTransformer)
        and type(network).forward_features is VisionTransformer.forward_features
        and network.global_pool == "token"
        and network.attn_pool is None
        and len(network.blocks) > 1
    )


def without_last_block(network: Any, images: Tensor) -> Tensor:
    """Return the tokens before the last block, class token first: images (B, 3, H, W) -> (B, P + N, D)."""
    ((patches, prefix),) = network.forward_intermediates(
        images,
        indices=[len(network.blocks) - 2],
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return torch.cat([prefix, patches], dim=1)


def last_block_and_head(network: Any, tokens: Tensor, pre_logits: bool = False) -> Tensor:
    """Return the logits (B, C) of tokens before the last block (B, P + N, D), or the pooled features (B, D)."""
    out: Tensor = network.forward_head(network.norm(network.blocks[-1](tokens)), pre_logits=pre_logits)
    return out

"""Download of pre-trained weights; without a network connection, it fails at once instead of after a minute of retries."""

import contextlib
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlparse

from huggingface_hub import constants

__all__ = ["no_weights", "offline_if_unreachable"]


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Set the offline mode of the Hugging Face hub if its host has no address and no proxy is configured.

    Cached weights are then loaded without a request, and a missing file raises an error at once.
    """
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    offline = constants.HF_HUB_OFFLINE
    if not offline and not any(os.environ.get(name) for name in proxies):
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            offline = True
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def no_weights(name: str, error: Exception, remedy: str | None = None) -> ValueError:
    """Return the error for pre-trained weights that cannot be loaded.

    Args:
        name: timm model name.
        error: why there are no weights.
        remedy: what to do; None advises to set a local weight file.
    """
    remedy = remedy or (
        "connect to the network, or set --model.network_args.pretrained_cfg_overlay '{file: FILE}' to a weight file of "
        f"{name}"
    )
    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].partition('. ')[0]}".rstrip(".")
    return ValueError(f"expected pre-trained weights for {name!r}, got none ({reason}); {remedy}")

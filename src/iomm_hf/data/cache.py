"""What the frozen parts make of a picture, computed once: the autoencoder's posterior and the MLLM's vision tokens.

Both stages ask the same frozen networks the same questions about the same pictures, epoch after epoch.
`recipes/precompute_latents.py` writes the answers beside each picture, as one safetensors blob in the column
`CACHE_COLUMN`: self-describing, and readable without a pickle. `CACHE_FILE` beside the shards names the frozen weights and
the resolution that they belong to, so that a run with others refuses them. The posterior is kept, not a draw from it: each
visit of a picture draws anew. `KEY_COLUMN` holds the sample's key in the source that was read, from which its time, noise,
mask and draw derive: a visit is the same with the cache and without, and only the order of visits is the cache's own.

The picture itself is kept for the vision tower, which reads it where `vision_tokens` are left out. PNG is the default since
it is exact; the JPEG of a photograph is several times smaller, and what the tower makes of it differs a little. Latents and
tokens are computed from the picture before it is encoded, so they are the same either way.
"""

import json
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


CACHE_COLUMN = "iomm_cache"
KEY_COLUMN = "iomm_key"  # caches of earlier versions have none: their samples are keyed by their place in the cache
CACHE_FILE = "iomm_cache.json"
BELONGS_TO = ("vision tower", "vae", "resolution", "vision_tokens")  # what one cache has one of


class Cached(NamedTuple):
    """
    mean, logvar (`torch.Tensor` of shape `(channels, height, width)`): Posterior of the resized and cropped picture.
    vision_tokens (`torch.Tensor` of shape `(tokens, D)`, *optional*): The picture as the MLLM reads it, nothing masked.
    """

    mean: torch.Tensor
    logvar: torch.Tensor
    vision_tokens: torch.Tensor | None = None


def pack(cached: Cached, dtype: Literal["float16", "float32"] = "float16") -> bytes:
    """As float16, which rounds a latent by a thousandth of its size at most, or as it is, in twice the bytes."""
    tensors = {name: tensor for name, tensor in cached._asdict().items() if tensor is not None}
    return save({name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in tensors.items()})


def unpack(blob: bytes) -> Cached:
    r"""
    The reverse of [`pack`], in float32.

    Raises:
        `ValueError`: bytes that hold no such thing.

    Example:

    ```python
    >>> import torch
    >>> from iomm_hf.data.cache import Cached, pack, unpack
    >>> unpack(pack(Cached(torch.ones(4, 2, 2), torch.zeros(4, 2, 2)))).mean.shape
    torch.Size([4, 2, 2])
    ```
    """
    try:
        return Cached(**{name: tensor.float() for name, tensor in load(blob).items()})
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"expected a cached picture, got {str(blob)[:40]}: {error}") from error


def read_cache_info(files: Iterable[str]) -> dict[str, Any]:
    r"""
    What the cache of these shards (local or fsspec addresses) was made with: the `CACHE_FILE` beside each says it.

    Raises:
        `ValueError`: there is none, or shards of several folders were made with other things.
    """
    read: dict[str, dict[str, Any]] = {}
    for file in files:
        address = f"{file.rsplit('/', 1)[0]}/{CACHE_FILE}"
        if address in read:
            continue
        try:
            with fsspec.open(address, "r") as handle:
                read[address] = json.load(handle)
        except FileNotFoundError as error:
            raise ValueError(f"{file} holds cached latents, but {address}, which says of what, is missing") from error
    (first, info), *others = read.items()
    for address, other in others:
        differing = [name for name in BELONGS_TO if other[name] != info[name]]
        if differing:
            raise ValueError(
                f"{first} and {address} name another {' and '.join(differing)}: their shards are not of one cache. Make"
                " them sources of their own, or precompute one anew."
            )
    return info

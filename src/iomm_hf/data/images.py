"""From bytes found in the wild to an RGB picture of the size that a model takes.

Everything that can be refused is refused from the header, before a pixel is decoded: other formats, pictures too small to
teach anything (a 1x1 tracking pixel) and decompression bombs. Every refusal is a [`BadImage`] with a short reason, so that
a reader of millions of files can skip and count. Transparency is laid on white, because that is how drawings are seen.
"""

import io
import struct
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


if TYPE_CHECKING:
    import torch

# Only formats that image collections really hold: each further decoder of PIL is one more that strangers' bytes reach.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 1024 * 1024
MIN_SIDE = 8
MODES = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
# What PIL's decoders raise for damaged bytes; flipping bytes in files of all six formats brings up nothing else.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, struct.error)


class BadImage(ValueError):
    """
    A picture that cannot be used.

    Args:
        reason (`str`):
            Short and stable, to count by: `no_image`, `missing_file`, `unknown_format`, `too_large`, `too_small`,
            `undecodable` or `unsupported_mode`.
        message (`str`):
            What was found and what was expected.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def load_image(value: Any, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> Image.Image:
    """
    Decode a picture to RGB: upright by its EXIF orientation, transparency on white, the first frame if it moves.

    Args:
        value (`bytes`, `dict` or `PIL.Image.Image`):
            Encoded bytes; the `{"bytes": ..., "path": ...}` that `datasets.Image(decode=False)` gives, where the path
            (local or an fsspec address) is read if there are no bytes; or a picture that is already open.
        max_pixels (`int`, *optional*, defaults to 64 Mpx):
            Width x height above which a picture is refused. PIL itself refuses more than 179 Mpx.
        min_side (`int`, *optional*, defaults to 8):
            Shorter edge, in pixels, below which a picture is refused.

    Returns:
        `PIL.Image.Image` in mode RGB.

    Raises:
        [`BadImage`]: with the reason, for whatever is no usable picture.

    Example:

    ```python
    >>> import io
    >>> from PIL import Image
    >>> from iomm_hf.data.images import load_image
    >>> buffer = io.BytesIO()
    >>> Image.new("RGBA", (64, 48)).save(buffer, "PNG")
    >>> load_image(buffer.getvalue()).getpixel((0, 0))
    (255, 255, 255)
    ```
    """
    image = value if isinstance(value, Image.Image) else _open(value)
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage("too_large", f"{width}x{height} pixels, expected at most {max_pixels} in all")
    if min(width, height) < min_side:
        raise BadImage("too_small", f"{width}x{height} pixels, expected a shorter edge of at least {min_side}")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except DAMAGED as error:
        raise BadImage("undecodable", f"{image.format} of {width}x{height} pixels: {error}") from error
    return _to_rgb(image)


def resize_and_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """
    Scale a picture until it just covers `size` and keep the centre: for squares, the paper's preparation of every training
    picture (shorter edge to `size`, centre crop).

    Args:
        image (`PIL.Image.Image`):
            A picture of any size and aspect ratio.
        size (`int` or `tuple[int, int]`):
            Side of a square, or width and height of the result, in pixels.

    Returns:
        `PIL.Image.Image` of exactly that size.

    Example:

    ```python
    >>> from PIL import Image
    >>> from iomm_hf.data.images import resize_and_crop
    >>> resize_and_crop(Image.new("RGB", (640, 427)), 512).size
    (512, 512)
    >>> resize_and_crop(Image.new("RGB", (640, 427)), (624, 416)).size
    (624, 416)
    ```
    """
    width, height = (size, size) if isinstance(size, int) else size
    if width < 1 or height < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    # The part that is kept goes straight to the result: resizing first would turn an 8x8000 strip into 512x512000 pixels.
    kept_width, kept_height = float(image.width), float(image.height)
    if image.width * height > image.height * width:
        kept_width = image.height * width / height
    else:
        kept_height = image.width * height / width
    left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def to_tensor(image: Image.Image) -> "torch.Tensor":
    """
    The pixels of an RGB picture as `torch.uint8` of shape (3, H, W), values 0 to 255.

    Args:
        image (`PIL.Image.Image`):
            A picture in mode RGB; another mode raises a `ValueError`.
    """
    import torch  # here, so that pictures can be checked and counted without it

    if image.mode != "RGB":
        raise ValueError(f"expected a picture in mode RGB, got {image.mode}: load it with load_image")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)


def _open(value: Any) -> Image.Image:
    """Read the header only."""
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
        if isinstance(value, str):
            try:
                with fsspec.open(value, "rb") as file:
                    value = file.read()
            except FileNotFoundError as error:
                raise BadImage("missing_file", f"no file at {value!r}") from error
    if not isinstance(value, bytes) or not value:
        raise BadImage("no_image", f"expected the bytes of a picture, got {value!r:.80}")
    try:
        return Image.open(io.BytesIO(value), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadImage("unknown_format", f"expected one of {', '.join(FORMATS)}, got {value[:16]!r}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_large", str(error)) from error
    except DAMAGED as error:
        raise BadImage("undecodable", f"damaged header: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL clips 16-bit grey at 255 instead of scaling it.
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode not in MODES:  # such as the floats of F, whose range nobody knows
        raise BadImage("unsupported_mode", f"expected I;16 or one of {', '.join(MODES)}, got {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")

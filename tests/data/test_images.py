import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from iomm_hf.data.images import BadImage, load_image, resize_and_crop, to_tensor


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width=40, height=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestAccepted:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_formats(self, format):
        image = load_image(encode(noise(), format))
        assert (image.mode, image.size) == ("RGB", (40, 32))

    def test_every_form_of_the_same_picture(self, tmp_path):
        data = encode(noise())
        path = tmp_path / "a.png"
        path.write_bytes(data)
        forms = [data, {"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": str(path)}, noise()]
        for form in forms:
            assert np.array_equal(load_image(form), noise())

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparency_becomes_white(self, mode):
        image = Image.new(mode, (16, 16), 0)
        assert load_image(encode(image)).getpixel((3, 3)) == (255, 255, 255)

    def test_half_transparent_black_is_grey(self):
        image = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
        assert load_image(encode(image)).getpixel((3, 3)) == (127, 127, 127)

    def test_palette_with_a_transparent_colour(self):
        image = Image.new("P", (16, 16), 0)
        image.putpalette([200, 0, 0, 0, 100, 0])
        image.putpixel((1, 1), 1)
        loaded = load_image(encode(image, transparency=0))
        assert loaded.getpixel((0, 0)) == (255, 255, 255)
        assert loaded.getpixel((1, 1)) == (0, 100, 0)

    def test_grey_of_16_bits_is_scaled_not_clipped(self):
        grey = Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16))
        loaded = np.asarray(load_image(encode(grey)))[..., 0].ravel()
        assert loaded.tolist() == list(range(256))

    @pytest.mark.parametrize("mode", ["CMYK", "L", "1"])
    def test_other_modes(self, mode):
        format = "JPEG" if mode == "CMYK" else "PNG"
        assert load_image(encode(Image.new(mode, (16, 16)), format)).mode == "RGB"

    def test_first_frame_of_an_animation(self):
        frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
        data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert load_image(data).getpixel((0, 0)) == (255, 0, 0)

    def test_exif_orientation(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees to see it upright
        assert load_image(encode(noise(40, 32), "JPEG", exif=exif)).size == (32, 40)


class TestRefused:
    @pytest.mark.parametrize(
        ("value", "reason", "message"),
        [
            (None, "no_image", "None"),
            (b"", "no_image", "b''"),
            ("a caption", "no_image", "a caption"),
            ({"bytes": None, "path": None}, "no_image", "None"),
            ({"bytes": None, "path": "/no/such.png"}, "missing_file", "/no/such.png"),
            (b"a photograph of a cat", "unknown_format", "a photograph"),
            (encode(noise(), "ICO"), "unknown_format", "expected one of JPEG"),
            (encode(noise(1, 1)), "too_small", "1x1"),
            (encode(noise(7, 400)), "too_small", "7x400"),
            (png_header(30000, 30000), "too_large", "900000000"),
            (png_header(9000, 9000), "too_large", "9000x9000"),
            (png_header(64, 64), "undecodable", "PNG of 64x64"),
            (encode(noise(), "JPEG")[:-200], "undecodable", "JPEG of 40x32"),
            (encode(noise().convert("F"), "TIFF"), "unsupported_mode", "got F"),
        ],
    )
    def test_reason_and_value(self, value, reason, message):
        with pytest.raises(BadImage, match=f"^{reason}: ") as error:
            load_image(value)
        assert error.value.reason == reason
        assert message in error.value.message

    def test_a_picture_in_memory_is_checked_too(self):
        with pytest.raises(BadImage, match="too_large: 40x32"):
            load_image(noise(), max_pixels=1000)

    @pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's remarks on damaged TIFF tags
    def test_damaged_bytes_never_raise_anything_else(self):
        rng = np.random.default_rng(0)
        for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
            good = encode(noise(), format)
            for _ in range(100):
                damaged = bytearray(good)
                for place in rng.integers(0, min(len(good), 400), size=3):
                    damaged[place] = rng.integers(0, 256)
                with contextlib.suppress(BadImage):
                    load_image(bytes(damaged))


class TestResize:
    @pytest.mark.parametrize("size", [(512, 512), (640, 427), (427, 640), (8, 3000), (3000, 8), (33, 32), (9, 9)])
    def test_exact_size_for_any_aspect_ratio(self, size):
        assert resize_and_crop(Image.new("RGB", size), 64).size == (64, 64)

    @pytest.mark.parametrize(("size", "resized"), [((120, 40), (96, 32)), ((40, 120), (32, 96))])
    def test_equals_resizing_first_and_cropping_the_centre(self, size, resized):
        image = noise(*size)
        left, top = (resized[0] - 32) // 2, (resized[1] - 32) // 2
        expected = image.resize(resized, Image.Resampling.LANCZOS).crop((left, top, left + 32, top + 32))
        assert np.abs(np.asarray(resize_and_crop(image, 32)).astype(int) - np.asarray(expected)).max() <= 2

    def test_large_pictures_are_smoothed(self):
        checks = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
        small = np.asarray(resize_and_crop(Image.fromarray(checks).convert("RGB"), 32))
        assert np.abs(small.astype(int) - 127).max() <= 2

    def test_size_must_be_positive(self):
        with pytest.raises(ValueError, match="got 0"):
            resize_and_crop(noise(), 0)


def test_to_tensor():
    tensor = to_tensor(noise(40, 32))
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 32, 40)
    assert tensor.is_contiguous()
    assert tuple(tensor[:, 5, 7].tolist()) == noise(40, 32).getpixel((7, 5))
    with pytest.raises(ValueError, match="got L"):
        to_tensor(noise().convert("L"))

"""What comes out of an image file: greys of all depths, palettes, transparency; files that are none."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from images import image_folder

from drive.experiments.data import sources as data
from drive.experiments.data.decode import BROKEN, LARGE, RANGE, decode, decoding

image = pytest.importorskip("PIL.Image", reason="images are decoded by Pillow")
RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)  # of 16 bits
BYTES = np.arange(32 * 32).reshape(32, 32) % 256


def saved(made: object, path: Path, **options: object) -> Path:
    made.save(path, **options)  # type: ignore[attr-defined]
    return path


def grey(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.uint8)).expand(3, -1, -1)


def read(path: Path) -> torch.Tensor | str:
    with decoding():
        return decode(path, 32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("x.png", "<u2"),
        ("x.tif", "<u2"),
        ("x.tif", ">u2"),
        ("x.pgm", "<u2"),
        ("x.jp2", "<u2"),
        ("x.tif", "<i4"),
    ],
)
def test_greys_of_16_bits_are_scaled(tmp_path: Path, name: str, dtype: str) -> None:
    values = RAMP.astype(np.uint16)
    found = read(saved(image.fromarray(values.astype(dtype)), tmp_path / name))
    assert isinstance(found, torch.Tensor) and torch.equal(found, grey(np.rint(values / 257)))
    assert len(found.unique()) == 256


@pytest.mark.parametrize("name", ["x.png", "x.pgm"])
def test_dark_greys_of_16_bits_stay_dark(tmp_path: Path, name: str) -> None:
    """Whatever Pillow gives them for a mode: the files say that they are of 16 bits."""
    path = tmp_path / name
    if name == "x.pgm":
        path.write_bytes(b"P5 32 32 65535\n" + BYTES.astype(">u2").tobytes())
    else:
        saved(image.fromarray(BYTES.astype(np.uint16)), path)
    found = read(path)
    assert isinstance(found, torch.Tensor) and torch.equal(found, grey(np.rint(BYTES / 257)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (BYTES.astype(np.int32), BYTES),
        ((BYTES / 255).astype(np.float32), BYTES),
        ((BYTES / 765).astype(np.float32), np.rint(BYTES / 3)),
        (BYTES.astype(np.float32), BYTES),
        (np.zeros((32, 32), np.float32), BYTES * 0),
        (np.zeros((32, 32), np.int32), BYTES * 0),
    ],
)
def test_integers_and_floats_of_32_bits(tmp_path: Path, values: np.ndarray, expected: np.ndarray) -> None:
    found = read(saved(image.fromarray(values), tmp_path / "x.tif"))
    assert isinstance(found, torch.Tensor) and torch.equal(found, grey(expected))


@pytest.mark.parametrize("value", [-1, 65536, np.float32(-0.1), np.float32(256), np.nan, np.inf])
def test_values_out_of_range(tmp_path: Path, value: float) -> None:
    values = BYTES.astype(np.int32 if isinstance(value, int) else np.float32)
    values[3, 4] = value
    assert read(saved(image.fromarray(values), tmp_path / "x.tif")) == RANGE


def colours() -> tuple[object, np.ndarray]:
    """An image of a palette, and its colours [32, 32, 3]."""
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    made = image.fromarray(BYTES.astype(np.uint8)).convert("P")
    made.putpalette(palette.tobytes())
    return made, palette[BYTES]


@pytest.mark.parametrize(
    ("name", "options"),
    [("x.png", {}), ("x.png", {"transparency": 7}), ("x.png", {"transparency": bytes(range(256))}),
     ("x.gif", {}), ("x.gif", {"transparency": 7}), ("x.tif", {})],
)  # fmt: skip
def test_palettes_keep_their_colours(
    tmp_path: Path, name: str, options: dict[str, object], recwarn: pytest.WarningsRecorder
) -> None:
    made, expected = colours()
    found = read(saved(made, tmp_path / name, **options))
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1)) and not recwarn.list


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_transparency_is_dropped(tmp_path: Path, mode: str, name: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (32, 32, len(mode)), dtype=np.uint8)
    found = read(saved(image.fromarray(values, mode), tmp_path / name))
    expected = torch.from_numpy(values[..., :-1]).permute(2, 0, 1).expand(3, -1, -1)
    assert isinstance(found, torch.Tensor) and torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("CMYK", "x.tif"), ("CMYK", "x.jpg"), ("1", "x.png"), ("L", "x.png"), ("RGB", "x.png"),
     ("RGB", "x.jfif"), ("YCbCr", "x.tif")],
)  # fmt: skip
def test_others_are_as_convert_has_them(tmp_path: Path, mode: str, name: str) -> None:
    rng = np.random.default_rng(0)
    made = image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).convert(mode)
    path = saved(made, tmp_path / name, format="JPEG" if name == "x.jfif" else None)
    with image.open(path) as opened:
        expected = np.array(opened.convert("RGB"))
    found = read(path)
    assert isinstance(found, torch.Tensor) and torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))


def png() -> bytes:
    written = io.BytesIO()
    image.fromarray(RAMP.astype(np.uint16)).save(written, "PNG")
    return written.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", png()[:-40], png()[:40], b"P5 9999999999999999999 1 255\n", b"P7 32 332\n",
     b"BM" + b"\xff" * 60, b"\0" * 4096, b"II*\0" + b"\xff" * 99],
)  # fmt: skip
def test_files_that_are_no_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert read(path) == BROKEN


@pytest.mark.parametrize("pixels", [1000, 500])
def test_too_many_pixels(tmp_path: Path, pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what Pillow warns of, and of what it refuses; the process's filters of warnings stay."""
    folder = image_folder(tmp_path / "photos")
    saved(image.new("RGB", (33, 31)), folder / "train/red/0.png")
    saved(image.new("RGB", (20, 20)), folder / "train/red/1.png")
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", pixels)
    for path in [*folder.glob("*/*/2.png"), *folder.glob("*/*/3.png"), folder / "train/blue/0.png"]:
        saved(image.new("RGB", (20, 20)), path)
    before = list(warnings.filters)
    found = data.load("imagefolder", str(folder))
    assert dict(found.skipped)["train/red/0.png"] == LARGE and "train/red/1.png" not in dict(found.skipped)
    assert warnings.filters == before

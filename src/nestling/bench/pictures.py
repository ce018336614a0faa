"""Labelled pictures to train on: scikit-learn's digits, the user's folders of images, and MNIST-like files.

pictures/cats/*.png  pictures/dogs/*.jpg                one folder a class; held out: every fifth picture, chosen by the seed
pictures/train/cats/*.png …  pictures/test/cats/*.png   with a split of their own (test, val, valid or validation)
pictures/train-images-idx3-ubyte.gz  pictures/train-labels-idx1-ubyte.gz  pictures/t10k-images-…      MNIST and its relatives
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.config import SettingError

HELD_OUT = 5  # every fifth picture, where there is no split
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TESTS = ("test", "val", "valid", "validation")
MISSING = (
    "the digits come with scikit-learn, which is not installed: pip install 'nestling[bench]', or choose other problems"
)
_IDX = re.compile(r"^(.*)images([-.])idx3-ubyte(\.gz)?$")


class Split(NamedTuple):
    """Pictures `[n, channel, pixels, pixels]`, of mean 0 and standard deviation 1 over the training set, and labels `[n]`."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures, as bytes.

    images    `[n, channel, pixels, pixels]` uint8; channels: 1 for gray ones, else 3
    labels    `[n]` int64
    classes   their names
    test      where the held-out pictures begin; None: the seed chooses them
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    test: int | None = None

    def split(self, seed: int) -> Split:
        """What is trained on and what is held out."""
        count = len(self.images)
        if self.test is None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            train, test = order[count // HELD_OUT :], order[: count // HELD_OUT]
        else:
            train, test = torch.arange(self.test), torch.arange(self.test, count)
        x = self.images[train].float()
        mean, deviation = x.mean(), x.std().clamp_min(1e-6)
        held_out = (self.images[test].float() - mean) / deviation
        return Split((x - mean) / deviation, self.labels[train], held_out, self.labels[test])


def digits() -> Pictures:
    """The 1,797 handwritten digits, 8 × 8 pixels, that scikit-learn ships with. Raises SettingError where it is not installed."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise SettingError(MISSING) from error
    found = load_digits()
    images = torch.from_numpy(found.images * 15).round().to(torch.uint8)[:, None]  # 0…16 as 0…240
    return Pictures(images, torch.from_numpy(found.target).long(), tuple(map(str, found.target_names)))


def read(folder: Path, pixels: int = 32) -> Pictures:
    """The pictures in a folder, laid out in one of the ways above. Raises SettingError for what cannot be read.

    pixels: classes of image files are cut to a square and scaled to this size. MNIST-like files keep theirs, zeros round it
    making it a multiple of 4.
    """
    if not folder.is_dir():
        raise SettingError(f"data: {folder} is no folder; expected one with a folder of images for every class")
    pairs = {path: match for path in sorted(folder.iterdir()) if (match := _IDX.match(path.name))}
    if pairs:
        return _mnist(folder, pairs)
    inside = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    tests = [inside[name] for name in TESTS if name in inside]
    if "train" not in inside or not tests:
        images, labels, classes = _classes(folder, pixels)
        return _checked(folder, Pictures(_gray(images), labels, classes))
    train, train_labels, classes = _classes(inside["train"], pixels)
    test, test_labels, others = _classes(tests[0], pixels)
    if others != classes:
        raise SettingError(f"data: {tests[0]} has the classes {', '.join(others)}; expected {', '.join(classes)}")
    return _checked(
        folder, Pictures(_gray(torch.cat([train, test])), torch.cat([train_labels, test_labels]), classes, len(train))
    )


def _classes(folder: Path, pixels: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise SettingError(
            "images are read by Pillow, which is not installed: pip install 'nestling[bench]'"
        ) from error
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    files = {path.name: sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) for path in folders}
    files = {name: found for name, found in files.items() if found}
    if len(files) < 2:
        raise SettingError(
            f"data: {folder} has {len(files)} folders with images ({', '.join(SUFFIXES)}); expected one for every class, and "
            "at least two"
        )
    images, labels = [], []
    for number, found in enumerate(files.values()):
        for file in found:
            try:
                with Image.open(file) as image:
                    square = ImageOps.fit(image.convert("RGB"), (pixels, pixels), Image.Resampling.BICUBIC)
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise SettingError(
                    f"data: {file} cannot be read as an image ({error}): mend it or leave it out"
                ) from error
            images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
            labels.append(number)
    return torch.stack(images), torch.tensor(labels), tuple(files)


def _gray(images: Tensor) -> Tensor:
    """One channel, where all three are alike."""
    alike = torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    return images[:, :1] if alike else images


def _checked(folder: Path, found: Pictures) -> Pictures:
    least = HELD_OUT * 2
    if len(found.images) < least:
        raise SettingError(f"data: {folder} has {len(found.images)} images; expected at least {least}")
    return found


def _mnist(folder: Path, pairs: Mapping[Path, re.Match[str]]) -> Pictures:
    images, labels, train = [], [], 0
    for path in sorted(pairs, key=lambda path: "train" not in path.name):  # training sets first
        start, mark, end = pairs[path].groups(default="")
        partner = folder / f"{start}labels{mark}idx1-ubyte{end}"
        if not partner.is_file():
            raise SettingError(f"data: {path.name} is without its labels; expected {partner.name} beside it")
        images.append(_idx(path, 3))
        labels.append(_idx(partner, 1))
        if len(images[-1]) != len(labels[-1]):
            raise SettingError(f"data: {path.name} has {len(images[-1])} pictures, but {len(labels[-1])} labels")
        train += len(images[-1]) if "train" in path.name else 0
    sizes = {tuple(x.shape[1:]) for x in images}
    height, width = sizes.pop()
    if sizes or height != width:
        raise SettingError(f"data: the pictures in {folder} are not all of one square size")
    missing = -height % 4
    x = F.pad(torch.cat(images), (missing // 2, missing - missing // 2) * 2)[:, None]
    y = torch.cat(labels).long()
    return _checked(
        folder, Pictures(x, y, tuple(map(str, range(int(y.max()) + 1))), train if 0 < train < len(x) else None)
    )


def _idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of bytes: 0, 0, 8, the number of dimensions, each as four bytes, then the values, the last fastest."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise SettingError(f"data: {path} cannot be read ({error}): unpack it by hand or fetch it again") from error
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) - start != np.prod(shape, dtype=np.int64):
        raise SettingError(f"data: {path} is no whole IDX file of {dimensions} dimensions: fetch it again")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())

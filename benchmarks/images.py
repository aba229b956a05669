"""Small images with classes, split for training and testing, and their corruptions, deterministic from a seed.

Corruptions are in the manner of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), with lengths relative to the side.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError

GREY = 0.5  # of what is occluded


@dataclass(frozen=True)
class Images:
    """Images [N, C, H, W] from 0 to 1 with the numbers of their classes [N]."""

    name: str
    pixels_NCHW: Tensor
    labels_N: Tensor

    @classmethod
    def read(cls, folder: Path | None, size: int) -> Images:
        """The digits, or the images of a folder in colour, resized. UserError for what cannot be read."""
        if folder is None:
            try:
                from sklearn.datasets import load_digits
            except ImportError:
                raise UserError(
                    "the digits are in scikit-learn, which is missing: pip install scikit-learn, or give --images DIR"
                ) from None
            found = load_digits()
            pixels_NCHW = torch.from_numpy(found.images).float()[:, None] / 16
            return cls("digits", resized(pixels_NCHW, size), torch.from_numpy(found.target).long())
        classes = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        files = [(path, label) for label, one in enumerate(classes) for path in sorted(one.iterdir())]
        if len({label for _, label in files}) < 2:
            raise UserError(f"--images {folder} has no images of two classes: give a folder with a folder of images for each class")
        pixels = [resized(read_image(path)[None], size) for path, _ in files]
        return cls(folder.resolve().name, torch.cat(pixels), torch.tensor([label for _, label in files]))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels_N.max()) + 1

    @property
    def sha256(self) -> str:
        """Hash of pixels and labels, in hex."""
        return hashlib.sha256(self.pixels_NCHW.numpy().tobytes() + self.labels_N.numpy().tobytes()).hexdigest()

    def split(self, held_out: float, seed: int) -> tuple[Images, Images]:
        """Those to train on, and those to test on. UserError if either has none."""
        order_N = torch.randperm(len(self.labels_N), generator=torch.Generator().manual_seed(seed))
        count = round(held_out * len(order_N))
        if not 0 < count < len(order_N):
            raise UserError(f"--held_out {held_out} of {len(order_N)} images is {count}: leave images on both sides")
        parts = order_N[count:], order_N[:count]
        return tuple(Images(self.name, self.pixels_NCHW[part], self.labels_N[part]) for part in parts)


def resized(pixels_NCHW: Tensor, size: int) -> Tensor:
    """The images with `size` rows and columns; unchanged if they have them."""
    if pixels_NCHW.shape[2:] == (size, size):
        return pixels_NCHW
    return F.interpolate(pixels_NCHW, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def read_image(path: Path) -> Tensor:
    """An image in colour [3, H, W]. UserError for a file that is none, and without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("Pillow reads images and is not installed: pip install pillow, or leave --images out") from None
    try:
        with Image.open(path) as image:
            return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): take it out of --images") from None


def noisy(pixels_NCHW: Tensor, deviation: float, draw: torch.Generator) -> Tensor:
    """Gaussian noise."""
    return pixels_NCHW + deviation * torch.randn(pixels_NCHW.shape, generator=draw)


def blurred(pixels_NCHW: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """A Gaussian blur whose deviation is a share of the side."""
    deviation = share * pixels_NCHW.shape[-1]
    radius = math.ceil(3 * deviation)
    weights_R = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * deviation**2))
    weights_R /= weights_R.sum()
    found_NHW = F.pad(pixels_NCHW, (radius,) * 4, mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(found_NHW, weights_R.view(1, 1, 1, -1)), weights_R.view(1, 1, -1, 1)).view(pixels_NCHW.shape)


def paler(pixels_NCHW: Tensor, kept: float, draw: torch.Generator) -> Tensor:
    """A share of the contrast, around the mean of each image."""
    return pixels_NCHW.mean((1, 2, 3), keepdim=True).lerp(pixels_NCHW, kept)


def occluded(pixels_NCHW: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """A grey square at a random place of each image; its side is a share of the image's."""
    N, size = len(pixels_NCHW), pixels_NCHW.shape[-1]
    side = round(share * size)
    first_2N1 = torch.randint(size - side + 1, (2, N, 1), generator=draw)
    covered_2NS = (torch.arange(size) >= first_2N1) & (torch.arange(size) < first_2N1 + side)
    covered_N1HW = (covered_2NS[0][:, :, None] & covered_2NS[1][:, None])[:, None]
    return pixels_NCHW.masked_fill(covered_N1HW, GREY)


# functions of images, severity and generator, with the severities from mild to strong
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], tuple[float, ...]]] = {
    "noise": (noisy, (0.1, 0.2, 0.4)),
    "blur": (blurred, (0.06, 0.1, 0.15)),
    "contrast": (paler, (0.6, 0.4, 0.2)),
    "occlusion": (occluded, (0.25, 0.375, 0.5)),
}


def corrupted(pixels_NCHW: Tensor, name: str, severity: float, seed: int) -> Tensor:
    """Images [N, C, H, W] from 0 to 1 after a corruption, the same for the same seed."""
    return CORRUPTIONS[name][0](pixels_NCHW, severity, torch.Generator().manual_seed(seed)).clamp(0, 1)

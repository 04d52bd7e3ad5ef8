"""Random augmentations of whole batches, drawn for each image separately.

torchvision's v2 transforms draw once per call. Called on a batch, they crop all its images alike;
called on every image, they cost more than a small network's step. These draw for all images of a
batch at once. They take (B, C, H, W), draw from torch's global generator, and go into `v2.Compose`
together with torchvision's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2


class RandomCrop(nn.Module):
    """Shifts by up to `padding` pixels; beyond the edges, all is `fill`, or else a reflection."""

    def __init__(self, padding: int = 4, fill: int | None = 128) -> None:
        super().__init__()
        self.padding = padding
        self.fill = fill

    def forward(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        if self.fill is None:
            padded = images[:, :, self._reflected(height)][..., self._reflected(width)]
        else:
            padded = F.pad(images, (self.padding,) * 4, value=self.fill)
        padded = padded.permute(0, 2, 3, 1)
        top, left = torch.randint(2 * self.padding + 1, (2, count, 1, 1))
        rows = top + torch.arange(height).view(-1, 1)
        columns = left + torch.arange(width)
        return padded[torch.arange(count).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)

    def _reflected(self, size: int) -> Tensor:
        """Where the padded image's rows or columns come from."""
        places = torch.arange(-self.padding, size + self.padding).abs()
        return size - 1 - (size - 1 - places).abs()


class RandomHorizontalFlip(nn.Module):
    """Mirrors each image with probability one half."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)


class AlternatingFlip:
    """Mirrors each image in every other epoch: one half in the even epochs, one in the odd.

    Two epochs then hold both views of every image. That saves time where they are few (Jordan,
    arXiv 2404.00498, section 3.6).

    Args:
        count: images in the dataset.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.first = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5

    def __call__(self, images: Tensor, indices: list[int], epoch: int) -> Tensor:
        mirrored = self.first[indices] ^ bool(epoch % 2)
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


class RandomMirror(nn.Module):
    """Mirrors half of the images of the classes that a mirror leaves meaningful.

    Args:
        classes: by its number, the class of the mirror image: the same one where a mirror changes
            nothing, another one for an arrow to the left.
    """

    def __init__(self, classes: dict[int, int]) -> None:
        super().__init__()
        self.classes = torch.full((max(classes) + 1,), -1)
        for one, mirrored in classes.items():
            self.classes[one] = mirrored

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and their classes (B,)."""
        known = labels < len(self.classes)
        mirrored = torch.where(known, self.classes[labels * known], -1)
        chosen = (mirrored >= 0) & (torch.rand(len(labels)) < 0.5)
        images = torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, torch.where(chosen, mirrored, labels)


class RandomAffine(nn.Module):
    """Rotates, shifts, scales and shears each image, repeating its edges; takes float images.

    Args:
        degrees: rotation within ± `degrees`.
        translate: shift within ± this share of the side.
        scale: size within 1 ± `scale`.
        shear: shift of a row within ± this share of its distance from the middle.
    """

    def __init__(self, degrees: float, translate: float, scale: float, shear: float = 0.0) -> None:
        super().__init__()
        self.degrees = degrees
        self.translate = translate
        self.scale = scale
        self.shear = shear

    def forward(self, images: Tensor) -> Tensor:
        angle, zoom, x, y = torch.empty(4, len(images)).uniform_(-1, 1)
        angle = angle * math.radians(self.degrees)
        zoom = 1 + zoom * self.scale
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        # In the coordinates of affine_grid, a side is 2 long.
        x, y = 2 * self.translate * x, 2 * self.translate * y
        # The rows of (rotation · zoom) · (shear).
        shear = torch.empty(len(images)).uniform_(-1, 1) * self.shear
        first = torch.stack([cos, cos * shear - sin, x], 1)
        second = torch.stack([sin, sin * shear + cos, y], 1)
        theta = torch.stack([first, second], 1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class RandomLight(nn.Module):
    """Scales brightness and contrast within 1 ± `strength`; takes float images in [0, 1]."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, images: Tensor) -> Tensor:
        brightness, contrast = 1 + torch.empty(2, len(images), 1, 1, 1).uniform_(-1, 1).mul_(
            self.strength
        )
        mean = images.mean((1, 2, 3), keepdim=True)
        return ((images - mean) * contrast + mean * brightness).clamp_(0, 1)


class RandomExposure(nn.Module):
    """Brightens or darkens, up to white where it clips; takes float images in [0, 1].

    Args:
        stops: the light is doubled or halved up to this many times.
    """

    def __init__(self, stops: float) -> None:
        super().__init__()
        self.stops = stops

    def forward(self, images: Tensor) -> Tensor:
        stops = torch.empty(len(images), 1, 1, 1).uniform_(-self.stops, self.stops)
        return (images * stops.exp2()).clamp_(0, 1)


class RandomShadow(nn.Module):
    """Darkens one side of a line, in half of the images; takes float images.

    The line goes anywhere, in any direction, and its edge is anything from hard to a gradient
    over the whole image.

    Args:
        strength: the share of the light that the shadow takes away at most.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        angle, place, hardness, depth = torch.rand(4, count, 1, 1)
        angle = 2 * math.pi * angle
        # The image is from -1 to 1, and the line at most 0.7 from its middle.
        rows = torch.linspace(-1, 1, height).view(-1, 1) * angle.sin()
        columns = torch.linspace(-1, 1, width) * angle.cos()
        distance = rows + columns - 1.4 * (place - 0.5)
        side = torch.sigmoid(1.5 * 20**hardness * distance)
        # Half of the depths are below 0: no shadow.
        shadow = side * self.strength * (2 * depth - 1).clamp(min=0)
        return images * (1 - shadow).unsqueeze(1)


class RandomBlur(nn.Module):
    """Mixes each image with a blurred copy of itself, in random parts; takes float images.

    Args:
        sigma: standard deviation of the Gaussian that blurs the copy, in pixels.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.blur = v2.GaussianBlur(2 * math.ceil(2 * sigma) + 1, (sigma, sigma))

    def forward(self, images: Tensor) -> Tensor:
        return torch.lerp(images, self.blur(images), torch.rand(len(images), 1, 1, 1))


class Cutout(nn.Module):
    """Zeroes a square around a random pixel (DeVries & Taylor, arXiv 1708.04552).

    Use it after normalization, where zero is the mean colour.

    Args:
        size: pixels a side.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        top = torch.randint(height, (count, 1, 1, 1)) - self.size // 2
        left = torch.randint(width, (count, 1, 1, 1)) - self.size // 2
        rows = torch.arange(height).view(-1, 1) - top
        columns = torch.arange(width) - left
        inside = (rows >= 0) & (rows < self.size) & (columns >= 0) & (columns < self.size)
        return images.masked_fill(inside, 0.0)


class EachImage(nn.Module):
    """Applies a torchvision transform, such as `v2.AutoAugment`, to each image separately."""

    def __init__(self, transform: nn.Module) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.transform(image) for image in images])


def train_transform(
    kind: str, mean: list[float], std: list[float], cutout: int = 0, auto_augment: bool = False
) -> v2.Compose:
    """Turns uint8 images into augmented, normalized float ones.

    Args:
        kind: `"objects"` (pad by 4 pixels of value 128, crop, and flip: the AMP paper's choice for
            CIFAR), `"light_objects"` (crop with 2 pixels of reflection, for few epochs; an
            `AlternatingFlip` belongs to it), `"signs"` (rotate, shift, scale, and change the light;
            a flip would turn one sign into another), `"strong_signs"` (more of it, shear, shadows,
            blur) or `"none"`.
        cutout: side of the square in pixels; 0 for none. The paper uses 16 on CIFAR.
        auto_augment: whether to apply AutoAugment's CIFAR-10 policy (Cubuk et al., CVPR 2019).
    """
    steps: list[nn.Module] = []
    if kind == "objects":
        steps += [RandomCrop(), RandomHorizontalFlip()]
    if kind == "light_objects":
        steps += [RandomCrop(2, fill=None)]
    if auto_augment:
        steps += [EachImage(v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))]
    steps += [v2.ToDtype(torch.float32, scale=True)]
    if kind == "signs":
        steps += [RandomAffine(degrees=12, translate=0.1, scale=0.15), RandomLight(0.4)]
    if kind == "strong_signs":
        steps += [RandomAffine(degrees=15, translate=0.1, scale=0.15, shear=0.15)]
        steps += [RandomShadow(0.85), RandomLight(0.5), RandomExposure(1.0), RandomBlur(1.0)]
    steps += [v2.Normalize(mean, std)]
    if cutout:
        steps += [Cutout(cutout)]
    return v2.Compose(steps)


def eval_transform(mean: list[float], std: list[float]) -> v2.Compose:
    """Turns uint8 images into normalized float ones."""
    return train_transform("none", mean, std)

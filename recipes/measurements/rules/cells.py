"""What is trained on what: the twelve cells of the comparison, and a smaller stand-in for each."""

import dataclasses
import io
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Cell:
    data: str
    model: str
    samples: int
    epochs: int
    augment: str = "none"
    batch: int = 128
    size: int = 32

    @property
    def vit(self) -> bool:
        return self.model.endswith("vit")

    def network(self, classes: int) -> nn.Module:
        """timm's, or one of the same kind with fewer layers."""
        if self.model == "cnn":
            widths = (3, 16, 32, 64, 64)
            layers: list[nn.Module] = []
            for narrow, wide in itertools.pairwise(widths):
                conv = nn.Conv2d(
                    narrow, wide, 3, stride=1 if narrow == 64 else 2, padding=1, bias=False
                )
                layers += [conv, nn.BatchNorm2d(wide), nn.ReLU()]
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
            return nn.Sequential(*layers, *head)
        sized = dict(img_size=self.size, patch_size=8) if self.vit else {}
        depth = dict(depth=2) if self.model == "vit" else {}
        name = "test_vit" if self.vit else self.model
        return timm.create_model(name, num_classes=classes, **sized, **depth)


CELLS = {
    "gtsrb resnet": Cell("gtsrb", "test_resnet", 2000, 60),
    "cifar resnet": Cell("cifar10", "test_resnet", 2000, 60, "objects"),
    "gtsrb vit": Cell("gtsrb", "test_vit", 1000, 120),
    "cifar vit": Cell("cifar10", "test_vit", 2000, 60),
    "digits resnet": Cell("digits", "test_resnet", 200, 60, batch=32),
    "digits vit": Cell("digits", "test_vit", 200, 60, batch=32),
    "gtsrb resnet short": Cell("gtsrb", "test_resnet", 10000, 5, "signs"),
    "cifar resnet short": Cell("cifar10", "test_resnet", 10000, 5, "objects"),
    "gtsrb vit short": Cell("gtsrb", "test_vit", 10000, 5, "signs"),
    "cifar vit short": Cell("cifar10", "test_vit", 10000, 5, "objects"),
    "digits resnet short": Cell("digits", "test_resnet", 1000, 3, batch=32),
    "digits vit short": Cell("digits", "test_vit", 1000, 3, batch=32),
}
# Stand-ins with smaller networks, images and sets, of which a dozen take a few minutes.
SMALL = {
    "gtsrb resnet": Cell("gtsrb", "cnn", 1000, 50, batch=64, size=16),
    "cifar resnet": Cell("cifar10", "cnn", 1000, 50, "objects", batch=64, size=16),
    "gtsrb vit": Cell("gtsrb", "vit", 700, 80, batch=64, size=16),
    "cifar vit": Cell("cifar10", "vit", 1000, 50, batch=64, size=16),
    "digits resnet": Cell("digits", "cnn", 200, 60, batch=32, size=16),
    "digits vit": Cell("digits", "vit", 200, 60, batch=32, size=16),
    "gtsrb resnet short": Cell("gtsrb", "cnn", 5000, 5, "signs", batch=64, size=16),
    "cifar resnet short": Cell("cifar10", "cnn", 5000, 5, "objects", batch=64, size=16),
    "gtsrb vit short": Cell("gtsrb", "vit", 5000, 5, "signs", batch=64, size=16),
    "cifar vit short": Cell("cifar10", "vit", 5000, 5, "objects", batch=64, size=16),
    "digits resnet short": Cell("digits", "cnn", 1000, 3, batch=32, size=16),
    "digits vit short": Cell("digits", "vit", 1000, 3, batch=32, size=16),
}
CELLS |= {f"small {name}": cell for name, cell in SMALL.items()}


def load(name: str, root: Path, cache: Path) -> dict[str, np.ndarray]:
    """uint8 images (n, 3, 32, 32) and labels of the train and the test split."""
    path = cache / f"{name}.npz"
    if not path.exists():
        import datasets
        from PIL import Image

        if name == "digits":
            sys.path.insert(0, str(Path(__file__).parents[2]))
            from train_digits import digits

            splits = digits().train_test_split(train_size=1000, stratify_by_column="label", seed=0)
        else:
            splits = datasets.load_dataset(str(root / name))
        arrays = {}
        for split in ("train", "test"):
            rows = splits[split]
            column = "img" if "img" in rows.features else "image"
            rows = (
                rows.cast_column(column, datasets.Image(decode=False)) if name != "digits" else rows
            )
            pixels = []
            for item in rows[column]:
                image = Image.open(io.BytesIO(item["bytes"])) if isinstance(item, dict) else item
                image = image.convert("RGB")
                if image.size != (32, 32):
                    image = image.resize((32, 32), Image.BICUBIC)
                pixels.append(np.asarray(image).transpose(2, 0, 1))
            arrays[f"{split}_x"] = np.stack(pixels)
            arrays[f"{split}_y"] = np.array(rows["label"][:])
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **arrays)
        part.replace(path)
    with np.load(path) as file:
        return dict(file)


def split_data(cell: Cell, split: str, seed: int, arrays: dict) -> tuple[torch.Tensor, ...]:
    x, y = arrays["train_x"], arrays["train_y"]
    if split == "test":
        test_x, test_y = arrays["test_x"], arrays["test_y"]
    else:
        rng = np.random.default_rng([seed, 5])
        held = np.zeros(len(y), bool)
        for label in np.unique(y):
            (where,) = np.nonzero(y == label)
            held[rng.permutation(where)[: round(len(where) / 5)]] = True
        test_x, test_y = x[held], y[held]
        x, y = x[~held], y[~held]
    chosen = np.random.default_rng(seed).permutation(len(y))[: cell.samples]
    if len(chosen) % cell.batch == 1:
        chosen = chosen[:-1]
    if cell.size < 32 and split == "held":
        few = np.random.default_rng(0).permutation(len(test_y))[:5000]
        test_x, test_y = test_x[few], test_y[few]
    tensors = list(map(torch.from_numpy, (x[chosen], y[chosen], test_x, test_y)))
    for i in (0, 2) if cell.size < 32 else ():
        pooled = F.avg_pool2d(tensors[i].float(), 32 // cell.size)
        tensors[i] = pooled.round().to(torch.uint8)
    return tuple(tensors)

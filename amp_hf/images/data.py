"""Image datasets for the Trainer: any Hub id or local folder, augmented a whole batch at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import TrainerCallback

# A set of decoded images up to this size is kept in memory.
IN_MEMORY_BYTES = 2 * 1024**3


class ImageDecodeError(ValueError):
    """An image of the dataset cannot be decoded; the message says which one."""


def load_images(
    name: str, image_column: str | None = None, label_column: str | None = None
) -> tuple[datasets.DatasetDict, str, str]:
    """A classification dataset: any Hub id, a local folder of parquet files or an image folder.

    Returns:
        The splits, and the names of the image column and of the label column. The label column is
        a `datasets.ClassLabel`, so that it has the class names.

    Raises:
        ValueError: the dataset is out of reach, or a column is missing.
    """
    try:
        splits = datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"Dataset {name!r} could not be loaded ({reason}). Pass --dataset a local folder of "
            "parquet files or of images; recipes/train_digits.py needs no download at all."
        ) from error
    features = next(iter(splits.values())).features
    image_column = _column(name, features, "image", image_column, datasets.Image)
    label_column = _column(name, features, "label", label_column, datasets.ClassLabel)
    if not isinstance(features[label_column], datasets.ClassLabel):
        splits = _with_classes(splits, label_column)
    return splits, image_column, label_column


def _column(
    dataset: str, features: datasets.Features, kind: str, wanted: str | None, feature: type
) -> str:
    """The `wanted` column, or else the first one of type `feature`."""
    named = [wanted] if wanted else [c for c in features if isinstance(features[c], feature)]
    types: tuple[type, ...] = (feature,)
    if kind == "label":  # may also be plain numbers or strings: see `_with_classes`
        types += (datasets.Value,)
        named += [] if wanted else ["label", "labels"]
    for column in named:
        if column in features and isinstance(features[column], types):
            return column
    raise ValueError(
        f"Dataset {dataset!r} has no {kind} column{f' {wanted!r}' if wanted else ''}; it has "
        f"{', '.join(features)}: name one with --{kind}_column."
    )


def _with_classes(splits: datasets.DatasetDict, label_column: str) -> datasets.DatasetDict:
    """Makes a column of numbers or strings a `ClassLabel`, the same in all splits."""
    values = {value for split in splits.values() for value in split.unique(label_column)}
    names = sorted(values - {None, -1})  # which stand for "unlabeled"
    index = {value: i for i, value in enumerate(names)}
    splits = splits.map(lambda row: {label_column: index.get(row[label_column])})
    label = datasets.ClassLabel(names=[str(value) for value in names])
    return splits.cast_column(label_column, label)


class ImageDataset(torch.utils.data.Dataset):
    """Batches of `pixel_values` (B, 3, size, size) and `labels` (B,).

    A set that fits into memory is decoded once; a larger one is decoded batch by batch, by the
    dataloader's workers if it has any. Augmentation depends on the seed, the epoch and the images
    of the batch, and on nothing else: it is the same after resuming and with any number of workers.

    `__getitems__` makes a whole batch at once: pass `as_is` as the Trainer's `data_collator`, and
    set `remove_unused_columns=False`.

    Args:
        geometry: resizes and crops a decoded RGB PIL image.
        transform: turns a uint8 batch into the model's input.
        progress: the progress bar's label; `None` shows no bar.
        numbers: each row's number in the original dataset, for error messages.

    Raises:
        ValueError: a label is not one of the label column's classes.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_column: str,
        geometry: Callable[[Any], Any],
        transform: nn.Module,
        seed: int = 0,
        progress: str | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.numbers = range(len(rows)) if numbers is None else numbers
        classes = rows.features[label_column].num_classes
        for number, label in zip(self.numbers, rows[label_column]):
            if label is None or not 0 <= label < classes:
                raise ValueError(
                    f"Label {label} of image {number} is none of the {classes} classes of column "
                    f"{label_column!r}: leave the unlabeled images out of the dataset."
                )
        self.rows = rows.select_columns([image_column]).cast_column(
            image_column, datasets.Image(mode="RGB")
        )
        self.labels = torch.tensor(rows[label_column][:])
        self.image_column = image_column
        self.geometry = geometry
        self.transform = transform
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # for persistent workers
        self._pixels: Tensor | None = None
        first = self._decode(0)
        if first.numel() * len(rows) <= IN_MEMORY_BYTES:
            self._pixels = torch.empty((len(rows), *first.shape), dtype=torch.uint8)
            disable = None if progress else True  # None: only a terminal shows the bar
            for i in tqdm(range(len(rows)), desc=f"Decoding {progress}", disable=disable):
                self._pixels[i] = self._decode(i)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        if self._pixels is None:
            pixels = torch.stack([self._decode(i) for i in indices])
        else:
            pixels = self._pixels[indices]
        key = np.array([self.seed, self.epoch, *indices], dtype=np.int64).tobytes()
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(zlib.crc32(key))
            pixels = self.transform(pixels)
        return {"pixel_values": pixels, "labels": self.labels[indices]}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def _decode(self, index: int) -> Tensor:
        try:
            return v2.functional.pil_to_tensor(self.geometry(self.rows[index][self.image_column]))
        except Exception as error:
            raise ImageDecodeError(
                f"Image {self.numbers[index]} of column {self.image_column!r} cannot be decoded: "
                f"{error}"
            ) from error


def as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collator for a dataset that makes whole batches by itself."""
    return batch


class EpochCallback(TrainerCallback):
    """Tells an `ImageDataset` which epoch it is, so that every epoch is augmented differently."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].dataset.epoch = int(state.epoch or 0)

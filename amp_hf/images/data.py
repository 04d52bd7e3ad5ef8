"""Image datasets for the Trainer, augmented a whole batch at a time."""

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

from ..job.data import DataError, check_labels
from .augment import AlternatingFlip, RandomMirror

# A set of decoded images up to this size is kept in memory.
IN_MEMORY_BYTES = 3 * 1024**3  # CIFAR-10 at 128 pixels takes 2.3


class ImageDecodeError(DataError):
    """An image of the dataset cannot be decoded; the message says which one."""


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
        mirror: takes a uint8 batch and its labels, and returns both as they are in this epoch.
        flip: mirrors a uint8 batch, by its indices and the epoch.
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
        mirror: RandomMirror | None = None,
        flip: AlternatingFlip | None = None,
    ) -> None:
        self.numbers = range(len(rows)) if numbers is None else numbers
        check_labels(rows, label_column, self.numbers)
        self.rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image())
        self.labels = torch.tensor(rows[label_column][:])
        self.image_column = image_column
        self.geometry = geometry
        self.transform = transform
        self.mirror = mirror
        self.flip = flip
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
        labels = self.labels[indices]
        key = np.array([self.seed, self.epoch, *indices], dtype=np.int64).tobytes()
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(zlib.crc32(key))
            if self.mirror is not None:
                pixels, labels = self.mirror(pixels, labels)
            if self.flip is not None:
                pixels = self.flip(pixels, indices, self.epoch)
            pixels = self.transform(pixels)
        return {"pixel_values": pixels, "labels": labels}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def _decode(self, index: int) -> Tensor:
        try:
            image = self.rows[index][self.image_column]
            if image.mode.startswith(("I", "F")):  # which PIL would clip
                raise ValueError("it has more than 8 bits a channel. Scale its values to 8 bits.")
            return v2.functional.pil_to_tensor(self.geometry(image.convert("RGB")))
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

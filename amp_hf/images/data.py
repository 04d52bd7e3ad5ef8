"""timm backbones and image datasets for the Trainer.

A model is a transformers `TimmWrapperForImageClassification`: everything that it takes to load it
again (architecture, class names, preprocessing) is in its config.json, so it loads with
`AutoModelForImageClassification`, `AutoImageProcessor` and `pipeline` without this package. The
networks of `amp_hf.images.models` need `trust_remote_code=True` for that.
"""

from __future__ import annotations

import difflib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from timm.data.transforms import MaybeToTensor
from torch import Tensor, nn
from torchvision.transforms import Normalize, ToTensor, v2
from tqdm.auto import tqdm
from transformers import (
    PreTrainedConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    TrainerCallback,
)

from . import models

# Up to this size a set of decoded images is held in memory.
IN_MEMORY_BYTES = 2 * 1024**3


class ImageDecodeError(ValueError):
    """An image of the dataset that cannot be decoded; the message says which."""


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
        reason = _first_line(error)
        raise ValueError(
            f"Dataset {name!r} could not be loaded ({reason}). Pass --dataset a local folder of "
            "parquet files or of images; recipes/train_digits.py needs no download at all."
        ) from error
    features = next(iter(splits.values())).features
    image_column = _column(name, features, "image", image_column, datasets.Image)
    label_column = _column(name, features, "label", label_column, datasets.ClassLabel)
    if not isinstance(features[label_column], datasets.ClassLabel):
        values = {value for split in splits.values() for value in split.unique(label_column)}
        names = sorted(values - {None, -1})
        index = {value: i for i, value in enumerate(names)}
        splits = splits.map(lambda row: {label_column: index.get(row[label_column])})
        label = datasets.ClassLabel(names=[str(value) for value in names])
        splits = splits.cast_column(label_column, label)
    return splits, image_column, label_column


def _column(
    dataset: str, features: datasets.Features, kind: str, wanted: str | None, feature: type
) -> str:
    """The column that is `wanted`, or else the first one of type `feature`."""
    named = [wanted] if wanted else [c for c in features if isinstance(features[c], feature)]
    types: tuple[type, ...] = (feature,)
    if kind == "label":  # plain numbers and strings become classes
        types += (datasets.Value,)
        named += [] if wanted else ["label", "labels"]
    for column in named:
        if column in features and isinstance(features[column], types):
            return column
    raise ValueError(
        f"Dataset {dataset!r} has no {kind} column{f' {wanted!r}' if wanted else ''}; it has "
        f"{', '.join(features)}: name one with --{kind}_column."
    )


class ImageDataset(torch.utils.data.Dataset):
    """Batches of `pixel_values` (B, 3, size, size) and `labels` (B,).

    Sets that fit into memory are decoded once, larger ones in the dataloader's workers; in both
    cases whole batches are augmented. The augmentation is a function of the seed, the epoch and the
    images in the batch alone: it is the same on resume, and with any number of workers.

    A batch is made at once in `__getitems__`: pass `as_is` as the Trainer's `data_collator` and set
    `remove_unused_columns=False`.

    Args:
        geometry: brings a decoded RGB PIL image to its final size.
        transform: brings a uint8 batch to the model's input.
        progress: what the progress bar says; `None` shows none.
        numbers: of the rows in the dataset they come from, for error messages.

    Raises:
        ValueError: a label is none of the label column's classes.
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
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers may live on
        self._pixels: Tensor | None = None
        first = self._decode(0)
        if first.numel() * len(rows) <= IN_MEMORY_BYTES:
            self._pixels = torch.empty((len(rows), *first.shape), dtype=torch.uint8)
            # `disable=None` shows a bar on terminals only.
            hidden = None if progress else True
            for i in tqdm(range(len(rows)), desc=f"Decoding {progress}", disable=hidden):
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
    """The collator of batches that a dataset has already made."""
    return batch


class EpochCallback(TrainerCallback):
    """Tells an `ImageDataset` the epoch, so that each has augmentations of its own."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].dataset.epoch = int(state.epoch or 0)


def build_model(
    name: str,
    label_names: list[str],
    image_size: int,
    from_scratch: bool = False,
    model_args: dict[str, Any] | None = None,
) -> TimmWrapperForImageClassification:
    """A classifier for images of `image_size` pixels a side, in float32.

    Args:
        name: a timm model (`"resnet18"`, `"vit_tiny_patch16_224"`, with or without a pretrained
            tag), or a local folder that a model was saved to.
        from_scratch: timm's own initial values instead of pretrained weights from the Hub.
        model_args: further arguments of `timm.create_model`, such as `{"patch_size": 4}`. They are
            saved with the model.

    Raises:
        ValueError: the name is unknown, the weights are out of reach, the images are too small,
            the model does not know one of `model_args`, or a saved model has another head.
    """
    if os.path.isdir(name):
        if model_args:
            raise ValueError(
                f"--model_args is for a timm model; the one saved in --model {name} has its own."
            )
        if not os.path.isfile(os.path.join(name, "config.json")) or (
            PreTrainedConfig.get_config_dict(name)[0].get("model_type") != "timm_wrapper"
        ):
            raise ValueError(
                f"--model {name} is a folder without a saved timm model: its config.json must be "
                "that of a TimmWrapper, as these recipes save it."
            )
        try:
            architecture = PreTrainedConfig.get_config_dict(name)[0].get("architecture")
            model = _class_of(architecture).from_pretrained(name, dtype=torch.float32)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The weights in --model {name} could not be loaded ({_first_line(error)})."
            ) from error
        model.config.pretrained_cfg["input_size"] = [3, image_size, image_size]
        saved = [str(label) for label in (model.config.id2label or {}).values()]
        if saved != label_names:
            raise ValueError(
                f"The model in {name} classifies {len(saved)} labels ({', '.join(saved[:3])}, …), "
                f"the dataset has {len(label_names)} ({', '.join(label_names[:3])}, …): train on "
                "the dataset it was made for, or start from a timm model."
            )
    else:
        model = _timm_model(name, label_names, image_size, from_scratch, model_args or {})
    _try_forward(model, name, image_size, len(label_names), model_args or {})
    return model


def origin(name: str, from_scratch: bool) -> tuple[str | None, str | None]:
    """Where the weights of `build_model(name, …, from_scratch)` are from: Hub id and license.

    Those of a saved model are the ones on its card, if it has one.
    """
    if os.path.isdir(name):
        path = os.path.join(name, "README.md")
        data: Any = ModelCard.load(path).data if os.path.isfile(path) else ModelCardData()
        return data.base_model, data.license
    if from_scratch:
        return None, None
    cfg: Any = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    return cfg.hf_hub_id, cfg.license and cfg.license.lower()


def preprocessing(
    model: TimmWrapperForImageClassification,
) -> tuple[v2.Compose, list[float], list[float]]:
    """What the image processor of the saved model will do to a PIL image.

    Returns:
        Its resizing and cropping, and the mean and standard deviation that it normalizes with.
    """
    processor = TimmWrapperImageProcessor(model.config.pretrained_cfg)
    geometry = [
        step
        for step in processor.val_transforms.transforms
        if not isinstance(step, (ToTensor, MaybeToTensor, Normalize))
    ]
    config = processor.data_config
    return v2.Compose(geometry), list(config["mean"]), list(config["std"])


def _timm_model(
    name: str,
    label_names: list[str],
    image_size: int,
    from_scratch: bool,
    model_args: dict[str, Any],
) -> TimmWrapperForImageClassification:
    architecture = name.removeprefix("timm/")
    known = timm.list_models() + timm.list_pretrained()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=4)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has them all."
        raise ValueError(f"--model {name!r} is neither a timm model nor a local folder: {hint}")
    cfg: Any = timm.get_pretrained_cfg(architecture)
    # Transformers have a position embedding of one size; timm resamples pretrained ones.
    sized = {"img_size": image_size} if cfg.fixed_input_size else {}
    all_args = sized | model_args
    try:
        backbone = timm.create_model(
            architecture, pretrained=not from_scratch, num_classes=len(label_names), **all_args
        )
    except (OSError, RuntimeError) as error:
        if from_scratch:
            raise _misfit(name, image_size, model_args, error) from error
        raise ValueError(
            f"The pretrained weights of {name!r} could not be loaded "
            f"({_first_line(error)}). Pass --from_scratch, or --model a local folder."
        ) from error
    except _MISFITS as error:
        raise _misfit(name, image_size, model_args, error) from error
    settings: dict[str, Any] = dict(
        architecture=architecture.partition(".")[0],
        id2label=dict(enumerate(label_names)),
        label2id={label: i for i, label in enumerate(label_names)},
        model_args=all_args or None,
        # What `AutoImageProcessor` reads. Squashed, not cropped: nothing of a small image is lost.
        pretrained_cfg={
            "input_size": [3, image_size, image_size],
            "mean": list(cfg.mean),
            "std": list(cfg.std),
            "interpolation": cfg.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "squash",
        },
    )
    config = TimmWrapperConfig(**settings)
    model = _class_of(config.architecture)(config)
    # The wrapper draws initial values of its own over timm's.
    model.timm_model.load_state_dict(backbone.state_dict())
    return model


def _class_of(architecture: str | None) -> type[TimmWrapperForImageClassification]:
    """transformers' class, or the one that brings the code of networks that timm has not."""
    if architecture in models.NAMES:
        return models.TimmWrapperForImageClassification
    return TimmWrapperForImageClassification


# What timm's models raise for images that are too small and arguments that they do not take.
_MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _try_forward(
    model: nn.Module, name: str, image_size: int, labels: int, model_args: dict[str, Any]
) -> None:
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, 3, image_size, image_size)).logits
        if logits.shape != (2, labels):
            raise ValueError(f"it returns {list(logits.shape)} for 2 images and {labels} labels")
    except _MISFITS as error:
        raise _misfit(name, image_size, model_args, error) from error


def _misfit(name: str, image_size: int, model_args: dict[str, Any], error: Exception) -> ValueError:
    args, change = "", ""
    if model_args:
        args, change = f" with --model_args {json.dumps(model_args)}", "change --model_args, "
    return ValueError(
        f"{name!r}{args} does not work on images of {image_size}x{image_size} pixels "
        f"({_first_line(error)}): {change}raise --image_size or take another --model."
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

"""The arguments of the recipes for image classification."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from ..config import AMPConfig
from ..job import arguments
from ..job.arguments import JobArguments
from .backbones import check_name


@dataclass
class ImageArguments(JobArguments):
    """Which model to train on which images, and what to measure for its card."""

    model: str = field(
        default="tf_efficientnet_lite0",
        metadata={"help": "A timm model, or the folder of a saved one."},
    )
    dataset: str = field(
        default="uoft-cs/cifar10",
        metadata={"help": "A Hub id, a local folder (images, or parquet files) or a parquet file."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Default: the first column of images."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels a side, after resizing. Default: a saved model's own, or 128."},
    )
    model_args: dict | str | None = field(
        default=None,
        metadata={"help": "Further arguments of the timm model, in JSON: '{\"patch_size\": 4}'."},
    )
    augment: Literal["objects", "light_objects", "signs", "strong_signs", "none"] = field(
        default="objects",
        metadata={
            "help": "objects: crop and flip; light_objects: crop less, and flip in every other "
            "epoch; signs: rotate, shift, scale, light, no flip; "
            "strong_signs: more of it, shear, shadows, blur."
        },
    )
    mirrored: dict | str | None = field(
        default=None,
        metadata={
            "help": "The classes of which strong_signs mirrors half of the images. In JSON, from a "
            "class's name to that of its mirror image: "
            '{"stop": "stop", "turn left": "turn right"}; {}: none.'
        },
    )
    track_length: int = field(
        default=1,
        metadata={
            "help": "How many images show the same object, on average, as the frames of a video "
            "do. --validation_fraction keeps them on one side of the split, unless they are all "
            "of a class."
        },
    )
    cutout: int = field(default=0, metadata={"help": "Pixels a side of Cutout's square; 0: none."})
    auto_augment: bool = field(
        default=False, metadata={"help": "AutoAugment with its policy for CIFAR-10."}
    )

    def __post_init__(self) -> None:
        self.model_args = _json_object("model_args", self.model_args)
        self.mirrored = _both_ways(_json_object("mirrored", self.mirrored) or {})
        check_name(self.model)  # before the dataset is downloaded
        self._check_positive("image_size", "track_length")
        if self.cutout < 0:
            raise ValueError(f"--cutout must be at least 0, got {self.cutout}.")
        super().__post_init__()


def _json_object(name: str, given: dict | str | None) -> dict[str, Any] | None:
    if not isinstance(given, str):
        return given
    with contextlib.suppress(ValueError):
        if isinstance(parsed := json.loads(given), dict):
            return parsed
    raise ValueError(f"--{name} must be a JSON object, got {given}.")


def _both_ways(mirrored: dict[str, Any]) -> dict[str, str]:
    both: dict[str, str] = {}
    for pair in mirrored.items():
        one, other = map(str, pair)
        if both.setdefault(one, other) != other or both.setdefault(other, one) != one:
            raise ValueError(
                f"--mirrored must name one mirror image of each class, got two of {one!r} or of "
                f"{other!r}."
            )
    return both


# For fine-tuning. Each recipe adds what its dataset needs.
_DEFAULTS: dict[str, Any] = dict(
    num_train_epochs=3,
    learning_rate=0.01,
    per_device_train_batch_size=128,
    per_device_eval_batch_size=256,
    optim="sgd",
    optim_args="momentum=0.9,nesterov=true",
    weight_decay=5e-4,
    lr_scheduler_type="cosine",
    max_grad_norm=0.0,
)
_FROM_SCRATCH_DEFAULTS: dict[str, Any] = dict(
    image_size=32, learning_rate=0.1, num_train_epochs=24, per_device_train_batch_size=128
)


def parse(
    defaults: dict[str, Any] | None = None,
    network_defaults: dict[str, Any] | None = None,
    description: str | None = None,
    argv: list[str] | None = None,
) -> tuple[ImageArguments, TrainingArguments, AMPConfig]:
    """`amp_hf.job.arguments.parse`, with the recipe's defaults after those for images.

    With `--from_scratch`, the image size, the learning rate, the number of epochs and the batch
    size are those for small images whatever `defaults` says, unless `network_defaults` does.
    """
    return arguments.parse(
        ImageArguments,
        _DEFAULTS | (defaults or {}),
        _FROM_SCRATCH_DEFAULTS,
        network_defaults or {},
        description,
        argv,
    )

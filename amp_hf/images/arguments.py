"""The arguments of the recipes for image classification."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..card import LICENSES
from ..config import AMPConfig


@dataclass
class ImageArguments:
    """Which model to train on which images, and what to measure for its card."""

    model: str = field(
        default="resnet18", metadata={"help": "A timm model, or the folder of a saved one."}
    )
    dataset: str = field(
        default="uoft-cs/cifar10",
        metadata={"help": "A Hub id, a local folder of parquet files, or an image folder."},
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Default: the first column of images."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Default: the first column of class labels."}
    )
    image_size: int = field(default=32, metadata={"help": "Pixels a side, after resizing."})
    from_scratch: bool = field(
        default=False, metadata={"help": "timm's initial values instead of pretrained weights."}
    )
    model_args: dict | str | None = field(
        default=None,
        metadata={"help": "Further arguments of the timm model, in JSON: '{\"patch_size\": 4}'."},
    )
    augment: Literal["objects", "signs", "strong_signs", "none"] = field(
        default="objects",
        metadata={
            "help": "objects: crop and flip; signs: rotate, shift, scale, light, no flip; "
            "strong_signs: more of it, shear, blur."
        },
    )
    cutout: int = field(default=0, metadata={"help": "Pixels a side of Cutout's square; 0: none."})
    auto_augment: bool = field(
        default=False, metadata={"help": "AutoAugment with its policy for CIFAR-10."}
    )
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Share of each class of the training set to hold out for validation."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this many images."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this many images."}
    )
    eval_splits: list[str] = field(
        default_factory=list,
        metadata={"help": "Further splits of the dataset to evaluate the trained model on."},
    )
    compare_erm: bool = field(
        default=False,
        metadata={"help": "For the model card: train the ERM baseline, too, without perturbation."},
    )
    flatness: bool = field(
        default=False,
        metadata={"help": "For the model card: measure and draw how flat the minimum is."},
    )
    license: str | None = field(
        default=None,
        metadata={"help": "The model's, as the Hub names it. Default: the pretrained weights'."},
    )
    budget: float | None = field(
        default=None,
        metadata={
            "help": "Training time to spend, in multiples > 1 of the stock Trainer's: sets AMP as "
            "AMPConfig.for_budget does. Other arguments override it."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.model_args, str):
            given = self.model_args
            with contextlib.suppress(ValueError):
                self.model_args = json.loads(given)
            if not isinstance(self.model_args, dict):
                raise ValueError(f"--model_args must be a JSON object, got {given}.")
        for name in ("image_size", "max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.cutout < 0:
            raise ValueError(f"--cutout must be at least 0, got {self.cutout}.")
        if self.license is not None and self.license not in LICENSES:
            raise ValueError(
                f"--license must be one of the Hub's identifiers, such as apache-2.0 or other, got "
                f"{self.license!r}: see https://huggingface.co/docs/hub/repositories-licenses."
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"--validation_fraction must be in [0, 1), got {self.validation_fraction}."
            )


# For fine-tuning. Each recipe adds what its dataset needs.
_DEFAULTS: dict[str, Any] = dict(
    image_size=128,
    num_train_epochs=10,
    learning_rate=0.01,
    per_device_train_batch_size=128,
    per_device_eval_batch_size=256,
    optim="sgd",
    optim_args="momentum=0.9,nesterov=true",
    weight_decay=5e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    max_grad_norm=0.0,
    logging_steps=50,
    logging_nan_inf_filter=False,  # shows when a training diverges
    save_strategy="epoch",
    save_total_limit=2,
    dataloader_pin_memory=torch.cuda.is_available(),
)
_FROM_SCRATCH_DEFAULTS: dict[str, Any] = dict(image_size=32, learning_rate=0.1)


def parse(
    defaults: dict[str, Any],
    from_scratch_defaults: dict[str, Any],
    description: str | None = None,
    argv: list[str] | None = None,
) -> tuple[ImageArguments, TrainingArguments, AMPConfig]:
    """Parses the command line, which may begin with the name of a YAML file of arguments.

    Args:
        defaults: the recipe's, of any argument.
        from_scratch_defaults: further ones, which hold with `--from_scratch`.
        argv: the arguments, if they do not come from the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = _read_yaml(argv[0]) + argv[1:]
    arguments: Any = (ImageArguments, TrainingArguments, AMPConfig)
    parser = HfArgumentParser(
        arguments,
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [config.yaml] [--argument value ...]  (--help lists the arguments)",
    )
    parser.set_defaults(**_DEFAULTS | defaults)
    known = parser.parse_known_args(argv)[0]
    if known.from_scratch:
        parser.set_defaults(**_FROM_SCRATCH_DEFAULTS | defaults | from_scratch_defaults)
    if known.budget is not None:
        parser.set_defaults(**AMPConfig.for_budget(known.budget).to_dict())
    images, args, amp_config = parser.parse_args_into_dataclasses(argv)
    args.remove_unused_columns = False  # an `ImageDataset` has no columns
    return images, args, amp_config


def _read_yaml(path: str) -> list[str]:
    """The file's arguments, as they would be written on the command line."""
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file) or {}
        if not isinstance(config, dict):
            raise ValueError("it is not a mapping")
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be YAML, one `argument: value` a line: {reason}") from error
    arguments: list[str] = []
    for name, value in config.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words = [json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values]
            arguments += [f"--{name}", *words]
    return arguments

"""timm backbones for the Trainer.

A model is a transformers `TimmWrapperForImageClassification`. Its config.json holds all that it
takes to load it again (architecture, class names, preprocessing), so `pipeline`,
`AutoModelForImageClassification` and `AutoImageProcessor` load it without this package. Networks of
`amp_hf.images.models` need `trust_remote_code=True` for that.
"""

from __future__ import annotations

import difflib
import json
import os
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data.transforms import MaybeToTensor
from torch import nn
from torchvision.transforms import Normalize, ToTensor, v2
from transformers import (
    PreTrainedConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)

from ..job.saved import first_line, origin_on_card
from . import models


def build_model(
    name: str,
    label_names: list[str],
    image_size: int | None,
    from_scratch: bool = False,
    model_args: dict[str, Any] | None = None,
) -> TimmWrapperForImageClassification:
    """A classifier for images of `image_size` pixels a side, in float32.

    Args:
        image_size: `None` is that of the saved model, or 128.
        name: a timm model (`"resnet18"`, `"vit_tiny_patch16_224"`, with or without a pretrained
            tag), or a local folder that a model was saved to.
        from_scratch: timm's own initial values instead of pretrained weights from the Hub.
        model_args: further arguments of `timm.create_model`, such as `{"patch_size": 4}`. They are
            saved with the model.

    Raises:
        ValueError: the name is unknown, the weights are out of reach, the images are too small,
            the model does not take one of `model_args`, or a saved model has another head or is
            to be trained from scratch.
    """
    model_args = model_args or {}
    if os.path.isdir(name):
        model = _saved_model(name, label_names, image_size, from_scratch, model_args)
        image_size = model.config.pretrained_cfg["input_size"][-1]
    else:
        image_size = image_size or 128
        model = _timm_model(name, label_names, image_size, from_scratch, model_args)
    _try_forward(model, name, image_size, len(label_names), model_args)
    return model


def check_name(name: str) -> None:
    """Refuses what is neither a timm model nor a local folder, with the names that come near."""
    architecture = name.removeprefix("timm/")
    known = timm.list_models() + timm.list_pretrained()
    if architecture not in known and not os.path.isdir(name):
        near = difflib.get_close_matches(architecture, known, n=4)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them all."
        raise ValueError(f"--model {name!r} is neither a timm model nor a local folder: {hint}")


def origin(name: str, from_scratch: bool) -> tuple[str | None, str | None]:
    """Hub id and license of the weights that `build_model(name, …, from_scratch)` starts from.

    For a saved model, they are those on its card, if it has one.
    """
    if os.path.isdir(name):
        return origin_on_card(name)
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


def _saved_model(
    folder: str,
    label_names: list[str],
    image_size: int | None,
    from_scratch: bool,
    model_args: dict[str, Any],
) -> TimmWrapperForImageClassification:
    if model_args:
        raise ValueError(
            f"--model_args are for a new model, and --model {folder} is a saved one, which keeps "
            "its own: leave --model_args out."
        )
    has_config = os.path.isfile(os.path.join(folder, "config.json"))
    config = PreTrainedConfig.get_config_dict(folder)[0] if has_config else {}
    if config.get("model_type") != "timm_wrapper":
        raise ValueError(
            f"--model {folder} is a folder without a saved timm model: its config.json must be "
            "that of a TimmWrapper, as these recipes save it."
        )
    if from_scratch:
        raise ValueError(
            f"--from_scratch is for a new model, and --model {folder} is a saved one: leave "
            "--from_scratch out to go on from its weights, or pass --model a timm model's name."
        )
    try:
        model_class = _class_for(config.get("architecture"))
        model = model_class.from_pretrained(folder, dtype=torch.float32)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The weights in --model {folder} could not be loaded ({first_line(error)})."
        ) from error
    size = image_size or model.config.pretrained_cfg.get("input_size", [128])[-1]
    model.config.pretrained_cfg["input_size"] = [3, size, size]
    saved = [str(label) for label in (model.config.id2label or {}).values()]
    if saved != label_names:
        raise ValueError(
            f"The model in {folder} classifies {len(saved)} labels ({', '.join(saved[:3])}, …), "
            f"the dataset has {len(label_names)} ({', '.join(label_names[:3])}, …): train on "
            "the dataset it was made for, or start from a timm model."
        )
    return model


def _timm_model(
    name: str,
    label_names: list[str],
    image_size: int,
    from_scratch: bool,
    model_args: dict[str, Any],
) -> TimmWrapperForImageClassification:
    check_name(name)
    architecture = name.removeprefix("timm/")
    cfg: Any = timm.get_pretrained_cfg(architecture)
    # A transformer's position embedding has one size, to which timm resamples a pretrained one.
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
            f"({first_line(error)}). Pass --from_scratch, or --model a local folder."
        ) from error
    except _MISFITS as error:
        raise _misfit(name, image_size, model_args, error) from error
    settings: dict[str, Any] = dict(
        architecture=architecture.partition(".")[0],
        id2label=dict(enumerate(label_names)),
        label2id={label: i for i, label in enumerate(label_names)},
        model_args=all_args or None,
        # `AutoImageProcessor` reads this. Squashing instead of cropping keeps all of a small image.
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
    model = _class_for(config.architecture)(config)
    # The wrapper has overwritten timm's initial values with its own.
    model.timm_model.load_state_dict(backbone.state_dict())
    return model


def _class_for(architecture: str | None) -> type[TimmWrapperForImageClassification]:
    """transformers' own class, or the one that saves the code of networks unknown to timm."""
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
        f"({first_line(error)}): {change}raise --image_size or take another --model."
    )

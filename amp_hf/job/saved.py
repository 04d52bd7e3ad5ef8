"""A folder that a model was saved to, and errors on loading it."""

from __future__ import annotations

import os
from typing import Any

import safetensors.torch
import yaml
from huggingface_hub import ModelCard
from torch import nn


def origin_on_card(folder: str) -> tuple[str | None, str | None]:
    """Hub id and license of the base model, as far as the folder's card says them."""
    path = os.path.join(folder, "README.md")
    if not os.path.isfile(path):
        return None, None
    try:
        data: Any = ModelCard.load(path).data
    except (TypeError, ValueError, yaml.YAMLError):  # no card of the Hub's
        return None, None
    license = data.license_name if data.license == "other" else data.license
    base = data.base_model if isinstance(data.base_model, str) else None
    return base, license if isinstance(license, str) else None


def load_weights(model: nn.Module, folder: str) -> nn.Module:
    """`model` with the weights of the folder. Under ZeRO-3, `from_pretrained` would shard it."""
    safetensors.torch.load_model(model, os.path.join(folder, "model.safetensors"))
    return model


def first_line(error: Exception) -> str:
    """What went wrong, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

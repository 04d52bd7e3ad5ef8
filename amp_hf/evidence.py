"""What a recipe measures for the model card once its model is trained and saved."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.trainer_utils import get_last_checkpoint

from .augment import eval_transform
from .card import CardDetails
from .flatness import LossSurface, measure
from .pictures import (
    draw_loss_contours,
    draw_loss_curves,
    draw_reliability,
    loss_contours,
    loss_curves,
    reliability,
    save,
    write_json,
)
from .record import results_of
from .trainer import AMPTrainer
from .vision import ImageDataset, preprocessing

Sets = dict[str, ImageDataset]


def train_baseline(baseline: AMPTrainer, sets: Sets, details: CardDetails, resumes: bool) -> None:
    """Trains, saves and evaluates the ERM baseline; its results go into `details`."""
    folder = str(baseline.args.output_dir)
    checkpoint = get_last_checkpoint(folder) if resumes and os.path.isdir(folder) else None
    result = baseline.train(checkpoint)
    baseline.save_model()
    baseline.save_state()
    for name, dataset in sets.items():
        baseline.evaluate(dataset, metric_key_prefix=name)
    details.baseline = results_of(baseline)
    if checkpoint is None:  # else it is a part of them
        details.baseline_seconds = result.metrics["train_runtime"]


def draw_calibration(
    trainer: AMPTrainer, trainers: dict[str, AMPTrainer], name: str, test: ImageDataset
) -> None:
    """A reliability diagram of `trainers` on the split `name`, for the card of `trainer`."""
    predictions = {}
    for model, each in trainers.items():
        prediction = each.predict(test)
        predictions[model] = prediction.predictions, prediction.label_ids
    if trainer.is_world_process_zero():
        numbers = reliability(predictions)
        path = os.path.join(str(trainer.args.output_dir), "reliability.png")
        caption = f"Reliability on the {name} split: how often it is right, by how sure it is"
        trainer.card_details.pictures[caption] = save(draw_reliability(numbers), numbers, path).name


def unaugmented(dataset: Any, model: Any) -> ImageDataset:
    """The images of an `ImageDataset` as `model` takes them when it is evaluated."""
    plain = copy.copy(dataset)
    plain.transform = eval_transform(*preprocessing(model)[1:])
    return plain


def measure_flatness(trainer: AMPTrainer, folders: dict[str, str]) -> None:
    """Measures and draws the loss around the models saved in `folders`, for the card of `trainer`.

    On the training images as they are, without augmentation. The models are loaded whole, by every
    process, whatever the engine shards.
    """
    trainer.accelerator.wait_for_everyone()  # until the main process has saved them
    surfaces = {}
    for name, folder in folders.items():
        # `from_pretrained` would shard it under ZeRO-3.
        model = TimmWrapperForImageClassification(TimmWrapperConfig.from_pretrained(folder))
        safetensors.torch.load_model(model, os.path.join(folder, "model.safetensors"))
        nn.Module.to(model, trainer.args.device)
        images = unaugmented(trainer.train_dataset, model)
        surfaces[name] = LossSurface.of(trainer, images, model, seed=trainer.args.seed)
        trainer.card_details.flatness[name] = measure(surfaces[name])
    curves, contours = loss_curves(surfaces), loss_contours(surfaces)
    if trainer.is_world_process_zero():
        output = Path(str(trainer.args.output_dir))
        found = {
            name: flatness.to_dict() for name, flatness in trainer.card_details.flatness.items()
        }
        write_json(found, output / "flatness.json")
        pictures = {
            "Training loss around the weights": ("loss_curves", draw_loss_curves(curves), curves),
            "Training loss over the plane of two random directions": (
                "loss_contours",
                draw_loss_contours(contours),
                contours,
            ),
        }
        for caption, (name, figure, numbers) in pictures.items():
            trainer.card_details.pictures[caption] = save(figure, numbers, output / name).name

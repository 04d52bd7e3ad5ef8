"""What a recipe measures for the model card: the model against the ERM baseline, and its flatness.

ERM (empirical risk minimization) is the same training without perturbation.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.trainer_utils import get_last_checkpoint

from ..config import AMPConfig
from ..flatness import LossSurface, measure
from ..pictures import (
    draw_loss_contours,
    draw_loss_curves,
    draw_reliability,
    loss_contours,
    loss_curves,
    reliability,
    save,
    write_json,
)
from ..record import results_of
from ..trainer import AMPTrainer
from .arguments import ImageArguments
from .augment import eval_transform
from .backbones import preprocessing
from .building import new_model, new_trainer
from .data import ImageDataset

Sets = dict[str, ImageDataset]  # by the name that their metrics begin with


def measure_for_card(images: ImageArguments, trainer: AMPTrainer, evaluated: Sets) -> None:
    """What `--compare_erm` and `--flatness` ask for, into `trainer.card_details` and the folder."""
    perturbed = trainer.amp_config.epsilon != 0
    trainers = {}
    if images.compare_erm and perturbed:
        trainers["ERM"] = train_baseline(images, trainer, evaluated)
    trainers["AMP" if perturbed else "ERM"] = trainer
    if "test" in evaluated:
        draw_calibration(trainer, trainers, "test", evaluated["test"])
    if images.flatness:
        folders = {name: str(each.args.output_dir) for name, each in trainers.items()}
        measure_flatness(trainer, folders)


def train_baseline(images: ImageArguments, trainer: AMPTrainer, evaluated: Sets) -> AMPTrainer:
    """Trains, saves and evaluates the ERM baseline: the same training without perturbation.

    Its folder, `_erm`, is never pushed: pushes leave out what begins with an underscore.
    """
    args = copy.copy(trainer.args)
    args.output_dir = folder = os.path.join(str(args.output_dir), "_erm")
    args.push_to_hub = False
    args.report_to = []  # the run of `trainer` is still open there
    model = new_model(images, args, list(trainer.model.config.id2label.values()))
    erm = new_trainer(
        AMPTrainer,
        model,
        args,
        AMPConfig(epsilon=0.0),
        trainer.train_dataset,
        trainer.eval_dataset,
    )
    resumes = bool(args.resume_from_checkpoint) and os.path.isdir(folder)
    checkpoint = get_last_checkpoint(folder) if resumes else None
    result = erm.train(checkpoint)
    erm.save_model()
    erm.save_state()
    for name, dataset in evaluated.items():
        erm.evaluate(dataset, metric_key_prefix=name)
    trainer.card_details.baseline = results_of(erm)
    if checkpoint is None:  # otherwise only a part of the training was timed
        trainer.card_details.baseline_seconds = result.metrics["train_runtime"]
    return erm


def draw_calibration(
    trainer: AMPTrainer, trainers: dict[str, AMPTrainer], name: str, test: ImageDataset
) -> None:
    """A reliability diagram of all `trainers` on the split `name`, for the card of `trainer`."""
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
    """The images of an `ImageDataset`, as `model` takes them in evaluation."""
    plain = copy.copy(dataset)
    plain.transform = eval_transform(*preprocessing(model)[1:])
    return plain


def measure_flatness(trainer: AMPTrainer, folders: dict[str, str]) -> None:
    """Measures and draws the loss around the models saved in `folders`, for the card of `trainer`.

    The loss is that of the training images without augmentation. Every process loads the models
    whole, even where the engine shards.
    """
    trainer.accelerator.wait_for_everyone()  # the main process may still be saving them
    surfaces = {}
    for name, folder in folders.items():
        # Under ZeRO-3, `from_pretrained` would shard it.
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

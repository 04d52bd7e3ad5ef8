"""What a recipe measures for the model card: the model against the ERM baseline, and its flatness.

ERM (empirical risk minimization) is the same training without perturbation.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..config import AMPConfig
from ..flatness import LossSurface, measure
from ..metrics import logits_of, temperature_scaled
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
from ..record import batch_size, results_of
from ..trainer import AMPTrainer
from .folder import baseline_folder, last_checkpoint, starts_afresh
from .job import Job
from .recipe_trainer import RecipeTrainer

Sets = dict[str, Any]  # datasets, by the name that their metrics begin with


def measure_for_card(job: Job, evaluated: Sets) -> None:
    """What `--compare_erm` and `--flatness` ask for, into the card's details and the folder."""
    trainer = job.trainer
    perturbed = trainer.amp_config.epsilon != 0
    trainers = {}
    if job.arguments.compare_erm and perturbed:
        trainers["ERM"] = train_baseline(job, evaluated)
    trainers["AMP" if perturbed else "ERM"] = trainer
    if "test" in evaluated:
        measure_calibration(trainer, trainers, "test", evaluated["test"])
    if job.arguments.flatness:
        measure_flatness(job, {name: str(each.args.output_dir) for name, each in trainers.items()})


def train_baseline(job: Job, evaluated: Sets) -> AMPTrainer:
    """Trains, saves and evaluates the ERM baseline: the same training without perturbation."""
    trainer = job.trainer
    args = copy.copy(trainer.args)
    args.output_dir = folder = baseline_folder(trainer.args)
    args.per_device_train_batch_size = batch_size(trainer)
    args.push_to_hub = False
    args.report_to = []  # the run of `trainer` is still open there
    erm = job.new_trainer(
        RecipeTrainer,
        job.new_model(args),
        args,
        AMPConfig(epsilon=0.0),
        trainer.train_dataset,
        trainer.eval_dataset,
    )
    checkpoint = None if starts_afresh(trainer.args) else last_checkpoint(folder)
    result = erm.train(checkpoint)
    erm.save_model()
    erm.save_state()
    for name, dataset in evaluated.items():
        erm.evaluate(dataset, metric_key_prefix=name)
    trainer.card_details.baseline = results_of(erm)
    if checkpoint is None:  # otherwise only a part of the training was timed
        trainer.card_details.baseline_seconds = result.metrics["train_runtime"]
    return erm


def measure_calibration(
    trainer: AMPTrainer, trainers: dict[str, AMPTrainer], name: str, test: Any
) -> None:
    """Of all `trainers`, on the split `name`, for the card of `trainer`: a reliability diagram, and
    the metrics that a temperature alone would lead to."""
    predictions = {}
    for model, each in trainers.items():
        prediction = each.predict(test)
        logits = logits_of(prediction.predictions)
        predictions[model] = logits, prediction.label_ids
        if len(logits) > 1:
            scaled = {name: temperature_scaled(*predictions[model])}
            trainer.card_details.temperature_scaled[model] = scaled
    if trainer.is_world_process_zero():
        numbers = reliability(predictions)
        path = os.path.join(str(trainer.args.output_dir), "reliability.png")
        caption = f"Reliability on the {name} split: how often it is right, by how sure it is"
        trainer.card_details.pictures[caption] = save(draw_reliability(numbers), numbers, path).name


def measure_flatness(job: Job, folders: dict[str, str]) -> None:
    """Measures and draws the loss around the models saved in `folders`, for the job's card.

    The loss is that of the training samples without augmentation.
    """
    trainer = job.trainer
    trainer.accelerator.wait_for_everyone()  # the main process may still be saving them
    surfaces = {}
    for name, folder in folders.items():
        model = job.load(folder)
        nn.Module.to(model, trainer.args.device)
        samples = job.unaugmented(trainer.train_dataset, model)
        surfaces[name] = LossSurface.of(trainer, samples, model, seed=trainer.args.seed)
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

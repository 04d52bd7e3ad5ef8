"""Image classification: the job of recipes/train_cifar10.py and recipes/train_gtsrb.py.

Arguments are those of `TrainingArguments`, of `AMPConfig` and of `ImageArguments`, from the command
line or from a YAML file. The file comes first, and arguments after it override it.
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import (
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
)

from ..job.data import NUMBER, find_column
from ..job.job import Job
from ..job.main import main as run_job
from ..job.saved import load_weights
from ..trainer import AMPTrainer
from .arguments import parse
from .augment import AlternatingFlip, RandomMirror, eval_transform, train_transform
from .backbones import build_model, origin, preprocessing
from .data import EpochCallback, ImageDataset, as_is
from .tracks import find_tracks, thumbnail

logger = logging.getLogger(__name__)


class ImageJob(Job):
    """A timm model on a dataset of images."""

    pipeline = "image-classification"

    def input_columns(self, features: datasets.Features) -> list[str]:
        chosen = self.arguments
        images = [name for name in features if isinstance(features[name], datasets.Image)]
        self.image_column = find_column(
            chosen.dataset, features, "image", chosen.image_column, images
        )
        return [self.image_column]

    def groups(self, rows: datasets.Dataset, label_column: str) -> np.ndarray | None:
        if self.arguments.track_length == 1:
            return None
        thumbnails = ImageDataset(
            rows,
            self.image_column,
            label_column,
            thumbnail,
            nn.Identity(),
            progress="thumbnails",
        ).__getitems__(list(range(len(rows))))
        pixels, labels = thumbnails["pixel_values"].numpy(), thumbnails["labels"].numpy()
        return find_tracks(pixels, labels, self.arguments.track_length)

    def build_model(self) -> TimmWrapperForImageClassification:
        return build_model(
            self.arguments.model,
            self.rows.label_names,
            self.arguments.image_size,
            self.arguments.from_scratch,
            self.arguments.model_args,
        )

    def origin(self) -> tuple[str | None, str | None]:
        return origin(self.arguments.model, self.arguments.from_scratch)

    def dataset(
        self, name: str, rows: datasets.Dataset, args: TrainingArguments, model: Any
    ) -> ImageDataset:
        geometry, mean, std = preprocessing(model)
        chosen = self.arguments
        transform, mirror, flip = eval_transform(mean, std), None, None
        if name == "train":
            mirror = self._mirror()
            if chosen.augment == "light_objects":
                flip = AlternatingFlip(len(rows), args.seed)
            transform = train_transform(
                chosen.augment, mean, std, chosen.cutout, chosen.auto_augment
            )
        return ImageDataset(
            rows,
            self.image_column,
            self.rows.label_column,
            geometry,
            transform,
            seed=args.seed,
            progress=name,
            numbers=rows[NUMBER][:],
            mirror=mirror,
            flip=flip,
        )

    def _mirror(self) -> RandomMirror | None:
        """Of the classes that the dataset has: a recipe's default is for one dataset alone."""
        chosen = self.arguments
        if chosen.augment != "strong_signs":
            return None
        numbers = {name: number for number, name in enumerate(self.rows.label_names)}
        unknown = sorted(chosen.mirrored.keys() - numbers.keys())
        if unknown and len(unknown) == len(chosen.mirrored):
            logger.warning(f"{chosen.dataset} has no class of --mirrored: nothing is mirrored.")
        elif unknown:
            logger.warning(f"--mirrored leaves out what {chosen.dataset} does not have: {unknown}.")
        classes = {
            numbers[one]: numbers[other]
            for one, other in chosen.mirrored.items()
            if not {one, other} & {*unknown}
        }
        return RandomMirror(classes) if classes else None

    def trainer_arguments(self) -> dict[str, Any]:
        return dict(data_collator=as_is, callbacks=[EpochCallback()])

    def new_trainer(
        self,
        trainer_class: type[AMPTrainer],
        model: PreTrainedModel,
        args: TrainingArguments,
        *rest: Any,
    ) -> AMPTrainer:
        args.remove_unused_columns = False  # an `ImageDataset` has no columns
        trainer = super().new_trainer(trainer_class, model, args, *rest)
        # FSDP and DeepSpeed shard contiguous parameters only.
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.model.to(memory_format=torch.channels_last)
        return trainer

    def load(self, folder: str) -> nn.Module:
        config = TimmWrapperConfig.from_pretrained(folder)
        return load_weights(TimmWrapperForImageClassification(config), folder)

    def unaugmented(self, dataset: ImageDataset, model: Any) -> ImageDataset:
        plain = copy.copy(dataset)
        plain.transform = eval_transform(*preprocessing(model)[1:])
        plain.mirror = plain.flip = None
        return plain


main = partial(run_job, ImageJob, parse)

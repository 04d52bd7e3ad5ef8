"""From a recipe's arguments to its trainer: the rows, the model, the image datasets."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import datasets
import numpy as np
import torch
from torchvision.transforms import v2
from transformers import TimmWrapperForImageClassification, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..card import CardDetails
from ..config import AMPConfig
from ..metrics import compute_metrics
from ..trainer import AMPTrainer
from .arguments import ImageArguments
from .augment import eval_transform, train_transform
from .backbones import build_model, origin, preprocessing
from .data import EpochCallback, ImageDataset, as_is, load_images
from .pushing import RecipeTrainer

_NUMBER = "number of the image"  # the column that keeps a row's number in the original split


def build(
    images: ImageArguments,
    args: TrainingArguments,
    amp_config: AMPConfig,
    trainer_class: type[AMPTrainer] = RecipeTrainer,
) -> tuple[AMPTrainer, dict[str, ImageDataset]]:
    """The trainer, and by name the datasets that the trained model is tested on.

    Raises:
        ValueError: an argument, or the dataset, is wrong; the message says which and why.
    """
    _check_writable(str(args.output_dir))
    _check_pictures(images)
    args.resume_from_checkpoint = _find_checkpoint(args)
    rows = _load_rows(images, args)
    model = new_model(images, args, rows.label_names)
    train, validation, tests = _image_datasets(rows, images, args, model)
    trainer = new_trainer(trainer_class, model, args, amp_config, train, validation)
    _check_comparison(images, trainer)
    trainer.card_details = _card_details(images)
    return trainer, tests


def new_model(
    images: ImageArguments, args: TrainingArguments, label_names: list[str]
) -> TimmWrapperForImageClassification:
    """The model that training starts from: the same one at every call."""
    set_seed(args.seed)
    return build_model(
        images.model,
        label_names,
        images.image_size,
        images.from_scratch,
        cast("dict[str, Any] | None", images.model_args),  # no longer a string, once parsed
    )


def new_trainer(
    trainer_class: type[AMPTrainer],
    model: TimmWrapperForImageClassification,
    args: TrainingArguments,
    amp_config: AMPConfig,
    train_dataset: Any,
    eval_dataset: Any,
) -> AMPTrainer:
    trainer = trainer_class(
        model=model,
        args=args,
        amp_config=amp_config,
        data_collator=as_is,
        compute_metrics=compute_metrics,
        callbacks=[EpochCallback()],
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    # FSDP and DeepSpeed shard contiguous parameters only.
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.model.to(memory_format=torch.channels_last)
    return trainer


def _check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder!r} cannot be written to: {error}") from error


def _check_pictures(images: ImageArguments) -> None:
    if (images.compare_erm or images.flatness) and find_spec("matplotlib") is None:
        raise ValueError("--compare_erm and --flatness draw pictures: pip install matplotlib.")


def _find_checkpoint(args: TrainingArguments) -> str | None:
    """The folder that `--resume_from_checkpoint`, a path or `true`, means."""
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        found = get_last_checkpoint(str(args.output_dir))
    else:
        found = wanted if os.path.isdir(wanted) else None
    if found is None:
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: no checkpoint there (--output_dir is "
            f"{args.output_dir!r})."
        )
    return found


@dataclass(frozen=True)
class _Rows:
    """The rows to train on, to validate on during the training, and to test on at its end."""

    train: datasets.Dataset
    validation: datasets.Dataset | None
    tests: dict[str, datasets.Dataset]
    image_column: str
    label_column: str

    @property
    def label_names(self) -> list[str]:
        return self.train.features[self.label_column].names


def _load_rows(images: ImageArguments, args: TrainingArguments) -> _Rows:
    splits, image_column, label_column = _load_splits(images, args)
    train, validation = splits["train"], splits.get("validation")
    if images.validation_fraction:
        parts = train.train_test_split(
            images.validation_fraction, stratify_by_column=label_column, seed=args.seed
        )
        train, validation = parts["train"], parts["test"]
    tests = {name: splits[name] for name in ["test", *images.eval_splits] if name in splits}
    if "test" in tests and set(tests["test"][label_column]) <= {-1, None}:
        print("The test split has no labels: there will be no test results.")
        del tests["test"]
    few, seed = images.max_eval_samples, args.seed
    return _Rows(
        train=_some(train, _training_size(len(train), images, args), seed),
        validation=validation and _some(validation, few, seed),
        tests={name: _some(rows, few, seed) for name, rows in tests.items()},
        image_column=image_column,
        label_column=label_column,
    )


def _load_splits(
    images: ImageArguments, args: TrainingArguments
) -> tuple[dict[str, datasets.Dataset], str, str]:
    """The splits, their rows numbered, and the names of the image and the label column."""
    with args.main_process_first(desc="loading the dataset"):
        splits, image_column, label_column = load_images(
            images.dataset, images.image_column, images.label_column
        )
    for argument, names in (("--dataset", ["train"]), ("--eval_splits", images.eval_splits)):
        if missing := [name for name in names if name not in splits]:
            raise ValueError(
                f"{argument}: {images.dataset!r} has no split {missing[0]!r}, only {list(splits)}."
            )
    splits = splits.select_columns([image_column, label_column])
    numbered = {
        name: rows.add_column(_NUMBER, np.arange(len(rows))) for name, rows in splits.items()
    }
    return numbered, image_column, label_column


def _training_size(available: int, images: ImageArguments, args: TrainingArguments) -> int:
    size = min(available, images.max_train_samples or available)
    # BatchNorm cannot train on a last batch of one image.
    return size - 1 if size % args.train_batch_size == 1 < size else size


def _some(rows: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """`count` of the rows, chosen at random; all of them where there are no more."""
    if count is None or count >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(count))


def _image_datasets(
    rows: _Rows,
    images: ImageArguments,
    args: TrainingArguments,
    model: TimmWrapperForImageClassification,
) -> tuple[ImageDataset, ImageDataset | None, dict[str, ImageDataset]]:
    """The datasets to train on, to validate on and to test on, as `model` takes their images."""
    geometry, mean, std = preprocessing(model)
    augment = train_transform(images.augment, mean, std, images.cutout, images.auto_augment)
    plain = eval_transform(mean, std)

    def dataset(name: str, part: datasets.Dataset, transform: v2.Compose) -> ImageDataset:
        return ImageDataset(
            part,
            rows.image_column,
            rows.label_column,
            geometry,
            transform,
            seed=args.seed,
            progress=name,
            numbers=part[_NUMBER][:],
        )

    return (
        dataset("train", rows.train, augment),
        rows.validation and dataset("validation", rows.validation, plain),
        {name: dataset(name, test, plain) for name, test in rows.tests.items()},
    )


def _check_comparison(images: ImageArguments, trainer: AMPTrainer) -> None:
    if images.compare_erm and trainer.is_deepspeed_enabled:
        raise ValueError(
            "--compare_erm trains twice, and DeepSpeed drives one training per process: leave it "
            "out, and train the ERM baseline in a run of its own, with --epsilon 0."
        )


def _card_details(images: ImageArguments) -> CardDetails:
    name = images.dataset
    base_model, license = origin(images.model, images.from_scratch)
    return CardDetails(
        # A folder's name alone: its path is of no use to anyone else.
        dataset=os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name,
        base_model=base_model,
        license=images.license or license,
    )

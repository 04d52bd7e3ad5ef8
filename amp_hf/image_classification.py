"""The main job: train a timm model on an image dataset with AMP, evaluate it and save it.

The recipes in recipes/ are this with a dataset's defaults. Arguments are those of
`TrainingArguments`, of `AMPConfig` and of `ImageArguments`, from the command line, or from a YAML
file (the first argument), which later arguments override.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from importlib.util import find_spec
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import TimmWrapperForImageClassification, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .augment import eval_transform, train_transform
from .card import CardDetails
from .config import AMPConfig
from .hub import HubError
from .image_arguments import ImageArguments, parse
from .markdown import literal
from .metrics import compute_metrics
from .trainer import AMPTrainer
from .vision import (
    EpochCallback,
    ImageDataset,
    ImageDecodeError,
    as_is,
    build_model,
    load_images,
    origin,
    preprocessing,
)

_NUMBER = "number of the image"


def main(
    defaults: dict[str, Any],
    from_scratch_defaults: dict[str, Any],
    description: str | None = None,
    argv: list[str] | None = None,
) -> dict[str, float]:
    """Parses, trains, evaluates on the test split, saves and says where.

    Args:
        defaults: of any argument, for this recipe.
        from_scratch_defaults: further ones where there are no pretrained weights.
        argv: instead of the command line.

    Returns:
        What `all_results.json` holds.

    Exits with one line, and 2 where the arguments or the data are wrong, 1 where a result is NaN or
    the push failed.
    """
    try:
        images, args, amp_config = parse(defaults, from_scratch_defaults, description, argv)
        trainer, tests = build(images, args, amp_config)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _exit(error)
    try:
        results = _train_and_evaluate(images, trainer, tests)
    except ImageDecodeError as error:  # from a dataloader's worker, with its traceback inside
        _exit(error)
    except HubError as error:
        _exit(error, 1)
    if not _all_finite(results):
        print("The training diverged: lower --learning_rate or --epsilon.", file=sys.stderr)
        sys.exit(1)
    return results


def build(
    images: ImageArguments,
    args: TrainingArguments,
    amp_config: AMPConfig,
    trainer_class: type[AMPTrainer] = AMPTrainer,
) -> tuple[AMPTrainer, dict[str, ImageDataset]]:
    """The trainer, and by name the sets that it is evaluated on in the end."""
    _check_writable(str(args.output_dir))
    if (images.compare_erm or images.flatness) and find_spec("matplotlib") is None:
        raise ValueError("--compare_erm and --flatness draw pictures: pip install matplotlib.")
    args.resume_from_checkpoint = _find_checkpoint(args)
    with args.main_process_first(desc="loading the dataset"):
        splits, image_column, label_column = load_images(
            images.dataset, images.image_column, images.label_column
        )
    # With their numbers, which messages about single images give.
    splits = splits.select_columns([image_column, label_column])
    splits = {name: rows.add_column(_NUMBER, np.arange(len(rows))) for name, rows in splits.items()}
    for argument, names in (("--dataset", ["train"]), ("--eval_splits", images.eval_splits)):
        if missing := [name for name in names if name not in splits]:
            raise ValueError(
                f"{argument}: {images.dataset!r} has no split {missing[0]!r}, only {list(splits)}."
            )
    train = splits["train"]
    validation, test = splits.get("validation"), splits.get("test")
    if test is not None and set(test[label_column]) <= {-1, None}:
        print("The test split has no labels: there will be no test results.")
        test = None
    if images.validation_fraction:
        parts = train.train_test_split(
            images.validation_fraction, stratify_by_column=label_column, seed=args.seed
        )
        train, validation = parts["train"], parts["test"]

    model = _model(images, args, train.features[label_column].names)
    geometry, mean, std = preprocessing(model)

    def dataset(rows: Any, limit: int | None, transform: Any, name: str) -> ImageDataset:
        if limit is not None and limit < len(rows):
            rows = rows.shuffle(seed=args.seed).select(range(limit))
        return ImageDataset(
            rows,
            image_column,
            label_column,
            geometry,
            transform,
            seed=args.seed,
            progress=name,
            numbers=rows[_NUMBER][:],
        )

    augment = train_transform(images.augment, mean, std, images.cutout, images.auto_augment)
    plain = eval_transform(mean, std)
    kept = min(len(train), images.max_train_samples or len(train))
    if kept % args.train_batch_size == 1 < kept:
        kept -= 1  # BatchNorm cannot do with a last batch of one
    trainer = _trainer(
        trainer_class,
        model,
        args,
        amp_config,
        train_dataset=dataset(train, kept, augment, "train"),
        eval_dataset=validation
        and dataset(validation, images.max_eval_samples, plain, "validation"),
    )
    if images.compare_erm and trainer.is_deepspeed_enabled:
        raise ValueError(
            "--compare_erm trains twice, and DeepSpeed drives one training a process: leave it "
            "out, and train ERM by a run of its own, with --epsilon 0."
        )
    base_model, license = origin(images.model, images.from_scratch)
    trainer.card_details = CardDetails(
        dataset=os.path.basename(os.path.abspath(images.dataset))
        if os.path.isdir(images.dataset)
        else images.dataset,
        base_model=base_model,
        license=images.license or license,
    )
    tests = {} if test is None else {"test": test}
    tests |= {name: splits[name] for name in images.eval_splits}
    return trainer, {
        name: dataset(rows, images.max_eval_samples, plain, name) for name, rows in tests.items()
    }


def _model(
    images: ImageArguments, args: TrainingArguments, names: list[str]
) -> TimmWrapperForImageClassification:
    set_seed(args.seed)
    model_args: Any = images.model_args  # a mapping, once it is parsed
    return build_model(images.model, names, images.image_size, images.from_scratch, model_args)


def _trainer(
    trainer_class: type[AMPTrainer],
    model: TimmWrapperForImageClassification,
    args: TrainingArguments,
    amp_config: AMPConfig,
    **datasets: Any,
) -> AMPTrainer:
    trainer = trainer_class(
        model=model,
        args=args,
        amp_config=amp_config,
        data_collator=as_is,
        compute_metrics=compute_metrics,
        callbacks=[EpochCallback()],
        **datasets,
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


def _train_and_evaluate(
    images: ImageArguments, trainer: AMPTrainer, tests: dict[str, ImageDataset]
) -> dict[str, float]:
    args = trainer.args
    result = trainer.train(args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # it is pushed when all is known
    trainer.save_state()
    results = dict(result.metrics)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    sets: dict[str, Any] = (
        {"eval": trainer.eval_dataset} if trainer.eval_dataset is not None else {}
    )
    sets |= tests
    for name, dataset in sets.items():
        metrics = trainer.evaluate(dataset, metric_key_prefix=name)
        trainer.log_metrics(name, metrics)
        trainer.save_metrics(name, metrics)
        results |= metrics
    trainer.create_model_card()
    failure = None
    if (images.compare_erm or images.flatness) and _all_finite(results):
        try:
            _gather_card_details(images, trainer, sets)
        except Exception as error:  # the model is pushed for all that
            failure = error
            print(f"The model card lacks what could not be measured: {error}", file=sys.stderr)
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        trust = ", trust_remote_code=True" if trainer.model.is_remote_code() else ""
        folder = str(args.output_dir)
        print(_SUMMARY.format(folder=folder, source=literal(folder), trust=trust))
    if args.push_to_hub:
        trainer.push_to_hub()
    if failure is not None:
        raise failure
    return results


def _all_finite(results: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in results.values())


def _gather_card_details(
    images: ImageArguments, trainer: AMPTrainer, sets: dict[str, ImageDataset]
) -> None:
    from . import evidence

    regularized = trainer.amp_config.epsilon > 0
    trainers = {}
    if images.compare_erm and regularized:
        args = copy.copy(trainer.args)
        args.output_dir = os.path.join(str(args.output_dir), "_erm")  # what has a _ is not pushed
        args.push_to_hub = False
        args.report_to = []  # where the run of `trainer` is still open
        model = _model(images, args, list(trainer.model.config.id2label.values()))
        baseline = _trainer(
            AMPTrainer,
            model,
            args,
            AMPConfig(epsilon=0.0),
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
        )
        resumes = bool(args.resume_from_checkpoint)
        evidence.train_baseline(baseline, sets, trainer.card_details, resumes)
        trainers["ERM"] = baseline
    trainers["AMP" if regularized else "ERM"] = trainer
    if "test" in sets:
        evidence.draw_calibration(trainer, trainers, "test", sets["test"])
    if images.flatness:
        folders = {name: str(each.args.output_dir) for name, each in trainers.items()}
        evidence.measure_flatness(trainer, folders)


_SUMMARY = """
Saved in {folder}: the model, README.md (its card), amp_config.json, all_results.json.
It loads without amp_hf:

    from transformers import pipeline
    classify = pipeline("image-classification", model={source}{trust})
"""


def _exit(error: Exception, status: int = 2) -> NoReturn:
    # An error from a dataloader's worker ends with its own message, behind the worker's traceback.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = lines[-1 if isinstance(error, ImageDecodeError) else 0]
    message = message.rpartition("ImageDecodeError: ")[2]
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    sys.exit(status)

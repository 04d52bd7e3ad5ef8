"""From a recipe's arguments to its trainer and its test sets."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from torch import nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from ..card import CardDetails
from ..compat import sgd_with_arguments
from ..config import AMPConfig
from ..metrics import compute_metrics
from ..trainer import AMPTrainer
from .arguments import JobArguments
from .data import Rows, choose_rows, load_splits, with_labels
from .folder import check_model, check_writable, find_checkpoint
from .recipe_trainer import RecipeTrainer
from .time_left import show_time_left


class Job(ABC):
    """A training run: `trainer`, and by name the datasets that the model is tested on, `tests`.

    What depends on the kind of data is abstract.

    Args:
        trainer_class: of `trainer`.

    Raises:
        ValueError: an argument, or the dataset, is wrong; the message says which and why.
    """

    arguments: Any  # a `JobArguments` of the kind
    pipeline: ClassVar[str]  # the name of the one that loads what was trained

    def __init__(
        self,
        arguments: JobArguments,
        args: TrainingArguments,
        amp_config: AMPConfig,
        trainer_class: type[AMPTrainer] = RecipeTrainer,
    ) -> None:
        self.arguments = arguments
        _check_pictures(arguments)
        _check_evaluation(args)
        check_model(arguments.model, str(args.output_dir))
        check_writable(str(args.output_dir))
        args.resume_from_checkpoint = find_checkpoint(args)
        self.rows = self._load_rows(args)
        if args.eval_on_start and not self.rows.validation:
            raise ValueError(
                "--eval_on_start needs rows to evaluate on: add --validation_fraction 0.1, say."
            )
        model = self.new_model(args)
        train = self.dataset("train", self.rows.train, args, model)
        validation = None
        if self.rows.validation:
            validation = self.dataset("validation", self.rows.validation, args, model)
        self.tests = {
            name: self.dataset(f"test ({name})", rows, args, model)
            for name, rows in self.rows.tests.items()
        }
        self.trainer = self.new_trainer(trainer_class, model, args, amp_config, train, validation)
        if arguments.compare_erm and self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "--compare_erm trains twice, and DeepSpeed drives one run per process: leave "
                "it out, and train the ERM baseline in a run of its own, with --epsilon 0."
            )
        self.trainer.card_details = self.card_details()

    @abstractmethod
    def input_columns(self, features: datasets.Features) -> list[str]:
        """The columns that the model's input is made of; `ValueError` where there are none."""

    def groups(self, rows: datasets.Dataset, label_column: str) -> np.ndarray | None:
        """The number of each row's group, (n,), if a validation split must not divide groups.

        All rows of a group have the same label.
        """
        return None

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """The model that training starts from, in float32."""

    @abstractmethod
    def origin(self) -> tuple[str | None, str | None]:
        """Hub id and license of the weights that training starts from."""

    @abstractmethod
    def dataset(
        self, name: str, rows: datasets.Dataset, args: TrainingArguments, model: Any
    ) -> Any:
        """`rows` as `model` takes them; augmented where it is named `"train"`."""

    @abstractmethod
    def trainer_arguments(self) -> dict[str, Any]:
        """Further arguments of the trainer."""

    @abstractmethod
    def load(self, folder: str) -> nn.Module:
        """A saved model, whole on every process, even where the engine shards."""

    def unaugmented(self, dataset: Any, model: Any) -> Any:
        """What `dataset` made of the rows to train on, as `model` takes it in evaluation."""
        return dataset

    def how_to_load(self, folder: str) -> str:
        """Python that loads what was saved in `folder`, the literal of a string."""
        has_code = getattr(self.trainer.model, "_auto_class", None) is not None
        trust = ", trust_remote_code=True" if has_code else ""
        return (
            "from transformers import pipeline\n"
            f'classify = pipeline("{self.pipeline}", model={folder}{trust})'
        )

    def new_model(self, args: TrainingArguments) -> PreTrainedModel:
        """The model that training starts from: the same one at every call."""
        set_seed(args.seed)
        return self.build_model()

    def new_trainer(
        self,
        trainer_class: type[AMPTrainer],
        model: PreTrainedModel,
        args: TrainingArguments,
        amp_config: AMPConfig,
        train_dataset: Any,
        eval_dataset: Any,
    ) -> AMPTrainer:
        trainer = trainer_class(
            model=model,
            args=args,
            amp_config=amp_config,
            compute_metrics=compute_metrics,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **sgd_with_arguments(args),
            **self.trainer_arguments(),
        )
        show_time_left(trainer)
        return trainer

    def _load_rows(self, args: TrainingArguments) -> Rows:
        arguments = self.arguments
        with args.main_process_first(desc="loading the dataset"):
            splits = load_splits(arguments.dataset, arguments.dataset_config)
            # First the labels, so that a column of strings is not taken for the input as well.
            splits, label = with_labels(arguments.dataset, splits, arguments.label_column)
            columns = self.input_columns(next(iter(splits.values())).features)
        return choose_rows(splits, columns, label, arguments, args, self.groups)

    def card_details(self) -> CardDetails:
        """What the trainer's card cannot know by itself."""
        name = self.arguments.dataset
        base_model, license = self.origin()
        return CardDetails(
            # A local path is of no use to others, and its name alone might be a Hub id.
            dataset=f"{Path(name).absolute().name} (local)" if os.path.exists(name) else name,
            dataset_config=self.arguments.dataset_config,
            base_model=base_model,
            license=self.arguments.license or license,
        )


def _check_pictures(arguments: JobArguments) -> None:
    if (arguments.compare_erm or arguments.flatness) and find_spec("matplotlib") is None:
        raise ValueError("--compare_erm and --flatness draw pictures: pip install matplotlib.")


def _check_evaluation(args: TrainingArguments) -> None:
    if not args.do_train:
        raise ValueError(
            "--do_train must be true: a recipe trains, and then evaluates what it has trained."
        )
    for name, value in (
        ("prediction_loss_only", False),
        ("eval_do_concat_batches", True),
        ("batch_eval_metrics", False),
    ):
        if getattr(args, name) != value:
            raise ValueError(
                f"--{name} must be {str(value).lower()}: accuracy, NLL and ECE are computed from "
                "all predictions together."
            )
    if args.optim.startswith("schedule_free") and 0 < args.warmup_steps < 1:
        raise ValueError(
            f"--warmup_steps must be a whole number with a schedule-free --optim, which would take "
            f"{args.warmup_steps:g} for a number of steps."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"--{name} must be false: it casts the model itself, which is saved and pushed "
                f"afterwards. --{name.removesuffix('_full_eval')} true evaluates in that precision."
            )

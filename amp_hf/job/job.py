"""From a recipe's arguments to its trainer and its test sets."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from ..card import CardDetails
from ..compat import sgd_with_arguments
from ..config import AMPConfig
from ..metrics import compute_metrics
from ..trainer import AMPTrainer
from .arguments import JobArguments
from .data import Rows, choose_rows, load_splits, with_labels
from .pushing import RecipeTrainer
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
        _check_writable(str(args.output_dir))
        _check_pictures(arguments)
        _check_evaluation(args)
        _check_model(arguments.model, str(args.output_dir))
        args.resume_from_checkpoint = _find_checkpoint(args)
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


# Adapters that lie beside a whole model are loaded on top of it, the Trainer asks the card that is
# there for the library, and all of it would be pushed with the next model.
_OF_A_RUN = (
    "checkpoint-*",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "adapter_model*.safetensors",
    "config.json",
    "adapter_config.json",
    "models.py",
    "README.md",
    "*_results.json",
    "trainer_state.json",
    "flatness.json",
    "loss_curves.*",
    "loss_contours.*",
    "reliability.*",
)


def baseline_folder(args: TrainingArguments) -> str:
    """The ERM baseline's. It is never pushed: pushes leave out what begins with an underscore."""
    return os.path.join(str(args.output_dir), "_erm")


def last_checkpoint(folder: str) -> str | None:
    """The last one that was saved whole: a run may have been killed while it saved another."""
    last = max(_checkpoints(folder), key=_step, default=None)
    return None if last is None else str(last)


def _checkpoints(folder: str) -> list[Path]:
    """Those that were saved whole."""
    found = Path(folder).glob("checkpoint-*/trainer_state.json")  # the last file of all
    return [path.parent for path in found if _step(path.parent) >= 0]


def _step(checkpoint: Path) -> int:
    """The number in its name, or −1."""
    number = checkpoint.resolve().name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def begins_here(args: TrainingArguments) -> bool:
    """Whether what lies in the output folder is an earlier run's, and not that of this one."""
    checkpoint = args.resume_from_checkpoint
    return checkpoint is None or Path(str(args.output_dir)).resolve() not in _parents(checkpoint)


def _parents(checkpoint: str) -> tuple[Path, Path]:
    """The folder that a checkpoint is in: by its name, and where links lead to."""
    return Path(os.path.abspath(checkpoint)).parent.resolve(), Path(checkpoint).resolve().parent


class SetAside(TrainerCallback):
    """Sets aside what would mix with the run, once the Trainer has accepted all of its arguments.

    Attributes:
        began: whether it has.
    """

    began = False

    def on_train_begin(
        self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any
    ) -> None:
        if not self.began and state.is_world_process_zero:  # a smaller batch size begins anew
            set_aside(args)
        self.began = True


def set_aside(args: TrainingArguments) -> None:
    """An earlier run's results, or the checkpoints after the one that this run goes back to.

    They stay in the folder `_earlier`, until something else is set aside. The ERM baseline of an
    earlier run is deleted.
    """
    folder = Path(str(args.output_dir))
    if begins_here(args):
        shutil.rmtree(baseline_folder(args), ignore_errors=True)
        found = [path for pattern in _OF_A_RUN for path in folder.glob(pattern)]
        what = "An earlier run's model and checkpoints are"
        if not any(path.is_dir() or path.suffix == ".safetensors" for path in found):
            return
    else:
        step = _step(Path(args.resume_from_checkpoint or ""))
        found = [path for path in _checkpoints(str(folder)) if 0 <= step < _step(path)]
        what = f"Checkpoints after {args.resume_from_checkpoint} are"
        if not found:
            return
    earlier = folder / "_earlier"
    shutil.rmtree(earlier, ignore_errors=True)
    earlier.mkdir()
    for path in found:
        path.rename(earlier / path.name)
    print(f"{what} now in {earlier}.")


def _check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder!r} cannot be written to: {error}") from error


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


def _check_model(model: str, output_dir: str) -> None:
    """The ERM baseline, and a resumed run, must find it as it was when the training began."""
    if os.path.isdir(model) and _is_of_a_run(Path(model).resolve(), Path(output_dir).resolve()):
        raise ValueError(
            f"--model {model!r} lies in --output_dir, whose models and checkpoints this run "
            "overwrites or moves: choose another --output_dir."
        )


def _is_of_a_run(folder: Path, output: Path) -> bool:
    """Whether a run into `output` overwrites, moves or deletes `folder`. Both are resolved."""
    return folder == output or (
        output in folder.parents
        and folder.relative_to(output).parts[0].startswith(("checkpoint-", "_"))
    )


def _find_checkpoint(args: TrainingArguments) -> str | None:
    """The folder that `--resume_from_checkpoint`, a path or `true`, means."""
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        found = last_checkpoint(str(args.output_dir))
    else:
        found = wanted if os.path.isdir(wanted) else None
    if found is None:
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: no checkpoint there (--output_dir is "
            f"{args.output_dir!r})."
        )
    output = Path(str(args.output_dir)).resolve()
    if output not in _parents(found) and _is_of_a_run(Path(found).resolve(), output):
        raise ValueError(
            f"--resume_from_checkpoint {wanted} is, or lies in, a folder that this run replaces: "
            f"move it into {args.output_dir!r} itself, or choose another --output_dir."
        )
    if not _can_go_on(Path(found)):
        inside = last_checkpoint(found)
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: no run can go on from {found!r}, which lacks the "
            "state of the Trainer or of the optimizer"
            + (f": the last checkpoint in it is {inside!r}." if inside else ".")
        )
    return found


def _can_go_on(checkpoint: Path) -> bool:
    """Whether it is whole. A run's own folder is not, nor what `--save_only_model` saved."""
    optimizer = (*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*"))  # DeepSpeed's
    return bool(optimizer) and (checkpoint / "trainer_state.json").exists()

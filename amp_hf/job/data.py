"""Datasets for classification: of the Hub, a folder or a file; and which of their rows to use."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import datasets
import numpy as np
from transformers import TrainingArguments

from .arguments import JobArguments

# The column that keeps a row's number in the original split.
NUMBER = "number of the row"


class DataError(ValueError):
    """A sample cannot be used; the message says which one. A dataloader's worker may raise it."""


def load_splits(name: str, config: str | None = None) -> datasets.DatasetDict:
    """The splits of a dataset of the Hub, of a local folder, or of one CSV, JSON or parquet file.

    Args:
        config: which of the dataset's configurations, if it has several.

    Raises:
        ValueError: it is out of reach, or broken.
    """
    kind = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(
        os.path.splitext(name)[1].lower()
    )
    try:
        if kind is not None:
            return datasets.load_dataset(kind, data_files=name)
        return datasets.load_dataset(name, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        remedy = (
            " Pass --dataset a local folder or file; recipes/train_digits.py needs no download at "
            "all."
        )
        raise ValueError(
            f"Dataset {name!r} could not be loaded ({_reason(error)})."
            f"{'' if os.path.exists(name) else remedy}"
        ) from error


def _reason(error: Exception) -> str:
    """One line: `datasets` says below its first one, or in the cause, what is wrong with a file."""
    lines = [line for line in f"{error}\n{error.__cause__}".splitlines() if line]
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        return lines[1]
    if lines[0].startswith("Config name is missing"):
        return f"{lines[1]}, with --dataset_config"
    return lines[0].rstrip(".")


def find_column(
    dataset: str,
    features: datasets.Features,
    kind: str,
    wanted: str | None,
    candidates: list[str],
    others: Iterable[str] = (),
) -> str:
    """The first of the candidates, or the `wanted` one.

    Args:
        dataset, features, kind: for the message: `--{kind}_column` is the argument.
        others: further columns of a type that fits, which are taken only where they are wanted.

    Raises:
        ValueError: there is none.
    """
    fitting = [*candidates, *others]
    for column in candidates if wanted is None else fitting:
        if wanted in (None, column):
            return column
    types = (
        f"{name} ({type_.dtype if isinstance(type_, datasets.Value) else type(type_).__name__})"
        for name, type_ in features.items()
    )
    remedy = f"name one with --{kind}_column" if fitting else "none of these types will do"
    raise ValueError(
        f"Dataset {dataset!r} has no {kind} column{f' {wanted!r}' if wanted else ''}; it has "
        f"{', '.join(types)}: {remedy}."
    )


def with_labels(
    dataset: str, splits: datasets.DatasetDict, wanted: str | None
) -> tuple[datasets.DatasetDict, str]:
    """The splits with a label column that is a `datasets.ClassLabel`, and that column's name.

    Raises:
        ValueError: there is no such column, or its values are not classes.
    """
    features = next(iter(splits.values())).features
    classes = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
    values = [name for name in features if isinstance(features[name], datasets.Value)]
    usual = [name for name in ("label", "labels") if name in values]
    column = find_column(dataset, features, "label", wanted, classes + usual, values)
    return (splits if column in classes else _with_classes(splits, column)), column


def _with_classes(splits: datasets.DatasetDict, column: str) -> datasets.DatasetDict:
    """Makes a column of numbers or strings a `ClassLabel`, the same in all splits."""
    kind = next(iter(splits.values())).features[column].dtype
    values = {value for split in splits.values() for value in split.unique(column)}
    if kind.startswith("float"):
        numbers = {value for value in values if value is not None and not math.isnan(value)}
        if numbers < values and all(value.is_integer() for value in numbers):
            raise ValueError(f"Column {column!r} has rows without a label: leave them out.")
        raise ValueError(
            f"Column {column!r} holds numbers of type {kind}, which are not classes: name another "
            "one with --label_column."
        )
    names = sorted(values - {None, -1})  # which stand for "unlabeled"
    index = {value: i for i, value in enumerate(names)}
    label = datasets.ClassLabel(names=[str(value) for value in names])

    def labeled(split: datasets.Dataset) -> datasets.Dataset:
        numbers = [index.get(value) for value in split[column]]
        # Not by `map`, which copies all columns into the cache.
        return split.remove_columns(column).add_column(column, numbers, feature=label)

    return datasets.DatasetDict({name: labeled(split) for name, split in splits.items()})


@dataclass(frozen=True)
class Rows:
    """The rows to train on, to validate on during the training, and to test on at its end.

    They have the columns of the input, that of the label, and `NUMBER`.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    tests: dict[str, datasets.Dataset]
    label_column: str

    @property
    def label_names(self) -> list[str]:
        return self.train.features[self.label_column].names


def choose_rows(
    splits: datasets.DatasetDict,
    columns: list[str],
    label_column: str,
    arguments: JobArguments,
    args: TrainingArguments,
    groups: Callable[[datasets.Dataset, str], np.ndarray | None],
) -> Rows:
    """Checks the splits, and divides them into the rows to train, validate and test on.

    Args:
        groups: `Job.groups`.

    Raises:
        ValueError: a split is missing, a row has no label, or too few are left to train on.
    """
    _check_splits(splits, arguments)
    numbered = {
        name: rows.select_columns([*columns, label_column]).add_column(NUMBER, np.arange(len(rows)))
        for name, rows in splits.items()
    }
    train, validation = numbered["train"], numbered.get("validation")
    _check_classes(train, label_column, arguments.dataset)
    if arguments.validation_fraction:
        if validation and args.process_index == 0:
            print(
                "The validation split is ignored, because --validation_fraction holds out rows of "
                "the training split instead. Leave the argument out to use the split."
            )
        check_labels(train, label_column, train[NUMBER])
        numbers, fraction = groups(train, label_column), arguments.validation_fraction
        train, validation = _divided(train, label_column, numbers, fraction, args.seed)
    tests = {name: numbered[name] for name in ["test", *arguments.eval_splits] if name in numbered}
    if "test" in tests and set(tests["test"][label_column]) <= {-1, None}:
        if args.process_index == 0:
            print("The test split has no labels: there will be no test results.")
        del tests["test"]
    if not validation and not tests and args.process_index == 0:
        print("There is nothing to evaluate the model on: add --validation_fraction 0.1, say.")
    few, seed = arguments.max_eval_samples, args.seed
    return Rows(
        train=_some(train, _training_size(len(train), arguments, args), seed),
        validation=validation and _some(validation, few, seed),
        tests={name: _some(rows, few, seed) for name, rows in tests.items()},
        label_column=label_column,
    )


def _check_splits(splits: datasets.DatasetDict, arguments: JobArguments) -> None:
    for argument, names in (("--dataset", ["train"]), ("--eval_splits", arguments.eval_splits)):
        if missing := [name for name in names if name not in splits]:
            raise ValueError(
                f"{argument}: {arguments.dataset!r} has no split {missing[0]!r}, only "
                f"{list(splits)}."
            )
    validated = "validation" in splits or arguments.validation_fraction
    if "eval" in arguments.eval_splits and validated:
        raise ValueError(
            "--eval_splits: a split 'eval' would take the place of the validation results, which "
            "are called that. Give it another name."
        )


def _check_classes(train: datasets.Dataset, label_column: str, dataset: str) -> None:
    classes = train.features[label_column].names
    if len(classes) < 2:
        check_labels(train, label_column, train[NUMBER])  # -1 may have been meant for one
        raise ValueError(
            f"{dataset!r} has one class in column {label_column!r}, {classes}: there is nothing to "
            "tell apart."
        )


def _divided(
    rows: datasets.Dataset,
    label_column: str,
    groups: np.ndarray | None,
    fraction: float,
    seed: int,
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """What to train on and what to hold out: a share of each class, in whole groups."""
    labels = np.array(rows[label_column][:])
    smallest = min(np.unique(labels, return_counts=True)[1])
    count = math.ceil(fraction * len(rows))
    # It rounds the share of a class, which may leave nothing on one side.
    if groups is None and smallest * min(count, len(rows) - count) >= len(rows):
        parts = rows.train_test_split(fraction, stratify_by_column=label_column, seed=seed)
        return parts["train"], parts["test"]
    held = _held_out(labels, np.arange(len(rows)) if groups is None else groups, fraction, seed)
    if not held.any():
        raise ValueError(
            "--validation_fraction: no class has more than one row, or track, to hold out from."
        )
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def _held_out(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which rows to hold out, (n,): about a share of each class, in whole groups.

    At least one group of a class remains, and at least one is held out if it has another.
    """
    held = np.zeros(len(labels), dtype=bool)
    random = np.random.default_rng(seed)
    for label in np.unique(labels):
        numbers, sizes = np.unique(groups[labels == label], return_counts=True)
        wanted = fraction * sizes.sum()
        *order, _ = random.permutation(len(numbers))
        chosen: list[int] = []
        count = 0
        for i in order:
            if count + sizes[i] / 2 <= wanted:
                chosen.append(i)
                count += sizes[i]
        held |= np.isin(groups, numbers[chosen or order[:1]])
    return held


def _training_size(available: int, arguments: JobArguments, args: TrainingArguments) -> int:
    """How many rows to train on, so that no batch is of a single sample."""
    size = min(available, arguments.max_train_samples or available)
    if args.dataloader_drop_last and size < args.train_batch_size * args.world_size:
        raise ValueError(
            f"--dataloader_drop_last leaves nothing to train on: {size} rows are less than "
            f"{args.world_size} x {args.train_batch_size}, a batch for each process."
        )
    # BatchNorm cannot train on a last batch of one sample.
    return size - 1 if size % args.train_batch_size == 1 < size else size


def _some(rows: datasets.Dataset, count: int | None, seed: int) -> datasets.Dataset:
    """`count` of the rows, chosen at random; all of them where there are no more."""
    if count is None or count >= len(rows):
        return rows
    return rows.shuffle(seed=seed).select(range(count))


def check_labels(rows: datasets.Dataset, label_column: str, numbers: Iterable[int]) -> None:
    """Checks that each row has one of the label column's classes.

    Args:
        numbers: each row's number in the original split.

    Raises:
        ValueError: a label is not one of the label column's classes.
    """
    classes = rows.features[label_column].num_classes
    for number, label in zip(numbers, rows[label_column]):
        if label is None or not 0 <= label < classes:
            raise ValueError(
                f"Label {label} of row {number} is none of the {classes} classes of column "
                f"{label_column!r}, where -1 stands for unlabeled: leave such rows out of the "
                "dataset, or call that class something else."
            )

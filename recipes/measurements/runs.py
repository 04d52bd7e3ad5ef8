"""What the scripts share that run the recipes many times: results by setting, row and seed.

A run that the file holds is not repeated, so a script that was stopped goes on where it was.
"""

import contextlib
import json
import os
import runpy
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm.auto import tqdm
from transformers import PrinterCallback

from amp_hf import AMPTrainer
from amp_hf.evidence import unaugmented
from amp_hf.flatness import LossSurface
from amp_hf.image_classification import build, parse

CACHE = os.path.join(tempfile.gettempdir(), "amp_hf_runs")
UNUSED = os.path.join(CACHE, "unused")
DIGITS = "digits"  # scikit-learn's
CURVATURE_SAMPLES = 250


@dataclass(frozen=True)
class Setting:
    """What is trained on what, for how long.

    Args:
        dataset: Hub id, or `DIGITS`.
        argv: the recipe's arguments.
        epsilon: what stands for {epsilon} in a row's arguments.
        base: the setting whose ERM model training begins with, instead of a new one.
    """

    title: str
    dataset: str
    argv: str
    epochs: int
    epsilon: float | None = None
    base: str | None = None

    @property
    def folder(self) -> str:
        return self.dataset.rpartition("/")[2]


@dataclass(frozen=True)
class Row:
    """How it is trained.

    Args:
        family: in a plot.
        epochs: times the setting's.
        curvature: whether the largest eigenvalue of the Hessian is measured.
    """

    argv: str
    family: str | None = None
    epochs: float = 1.0
    trainer: type[AMPTrainer] = AMPTrainer
    curvature: bool = False


@dataclass
class RunArguments:
    rounds: int = field(default=9, metadata={"help": "Of the timing; 0 leaves it out."})
    data: str | None = field(
        default=None, metadata={"help": "Folder of local copies; else they come from the Hub."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "All results, in JSON; plots lie beside it. Default: beside this file."},
    )

    def check_names(self, **known: Iterable[str]) -> None:
        """That every name in each of these options is a known one."""
        for option, names in known.items():
            if unknown := [value for value in getattr(self, option) if value not in names]:
                raise ValueError(f"--{option} knows {', '.join(names)}, not {unknown[0]!r}.")

    def check_data(self, settings: Iterable[Setting]) -> None:
        for setting in settings if self.data else ():
            if setting.dataset != DIGITS and not os.path.isdir(self._copy(setting)):
                raise ValueError(
                    f"--data {self.data} has no folder {setting.folder!r}. Pass --data a folder of "
                    "local copies, or leave it out to take the data sets from the Hub."
                )

    def source(self, setting: Setting) -> str:
        """The `--dataset` of the recipe."""
        if setting.dataset == DIGITS:
            return _made_once(DIGITS, _save_digits)
        return self._copy(setting) if self.data else setting.dataset

    def _copy(self, setting: Setting) -> str:
        return os.path.join(self.data or "", setting.folder)


def _made_once(name: str, make: Callable[[Path], object]) -> str:
    """A folder for all processes: it is there as a whole or not at all."""
    folder = Path(CACHE, name)
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = Path(tempfile.mkdtemp(dir=CACHE))
            make(part)
            part.replace(folder)
    return str(folder)


def _save_digits(folder: Path) -> None:
    """scikit-learn's digits, 1,000 of them to train on, as a dataset of parquet files."""
    digits = runpy.run_path(str(Path(__file__).parents[1] / "train_digits.py"))["digits"]
    parts = digits().train_test_split(train_size=1000, stratify_by_column="label", seed=0)
    for split, rows in parts.items():
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")


class Runs:
    """The results in a JSON file: `found["runs"]`, a mapping each, and `found["times"]`, the ratios
    of training times to ERM's by setting and row."""

    def __init__(
        self,
        settings: dict[str, Setting],
        rows: dict[str, Row],
        options: RunArguments,
        path: Path,
    ) -> None:
        self.settings = settings
        self.rows = rows
        self.options = options
        self.path = Path(options.output) if options.output else path
        self._read()

    def fill(self, cells: Iterable[tuple[str, str]], seeds: Iterable[int]) -> None:
        """Runs what is not there yet of these settings and rows."""
        wanted = [(key, row, seed) for seed in seeds for key, row in cells]
        for key, row, seed in tqdm(wanted, unit=" runs", disable=None):
            self._read()  # others may fill it, too
            if seed not in self.by_seed(key, row, "nll"):
                result = self._run(key, row, seed)
                with self._latest() as found:
                    found["runs"].append(result)

    def time(self, cells: Iterable[tuple[str, str]]) -> None:
        """Times what has not been."""
        by_setting: dict[str, list[str]] = {}
        for key, name in cells:
            if self.time_ratio(key, name) is None:
                by_setting.setdefault(key, ["ERM"]).append(name)
        for key, names in by_setting.items() if self.options.rounds else ():
            ratios = self._times(key, list(dict.fromkeys(names)))
            with self._latest() as found:
                found["times"][key] = found["times"].get(key, {}) | ratios

    def by_seed(self, key: str, name: str, column: str) -> dict[int, float]:
        return {
            run["seed"]: run[column]
            for run in self.found["runs"]
            if (run["setting"], run["row"]) == (key, name) and column in run
        }

    def values(self, key: str, name: str, column: str) -> list[float]:
        """One a seed."""
        return list(self.by_seed(key, name, column).values())

    def time_ratio(self, key: str, name: str) -> float | None:
        ratios = self.found["times"].get(key, {}).get(name)
        return statistics.median(ratios) if ratios else None

    def arguments(self, key: str, name: str, seed: int) -> list[str]:
        """What the recipe of the setting takes on its command line."""
        setting, row = self.settings[key], self.rows[name]
        epochs = f"--num_train_epochs {setting.epochs * row.epochs:g}"
        own = row.argv.format(epsilon=setting.epsilon)
        words = f"{setting.argv} {epochs} --seed {seed} {own}".split()
        if setting.base is not None:
            words += ["--model", self._base(setting.base)]
        return [*words, "--save_strategy", "no", "--dataset", self.options.source(setting)]

    def _trainer(self, key: str, name: str, seed: int, *more: str):
        quiet = ["--logging_strategy", "no", "--disable_tqdm", "true", "--output_dir", UNUSED]
        argv = [*self.arguments(key, name, seed), *quiet, *more]
        trainer, tests = build(*parse({}, {}, None, argv), self.rows[name].trainer)
        trainer.remove_callback(PrinterCallback)
        held_out = trainer.eval_dataset  # where a part of the training set is
        return trainer, tests["test"] if held_out is None else held_out

    def _run(self, key: str, name: str, seed: int) -> dict[str, Any]:
        row = self.rows[name]
        trainer, test = self._trainer(key, name, seed)
        seconds = trainer.train().metrics["train_runtime"]
        metrics = trainer.evaluate(test, metric_key_prefix="test")
        result = {
            "setting": key,
            "row": name,
            "seed": seed,
            "accuracy": metrics["test_accuracy"],
            "nll": metrics["test_nll"],
            "ece": metrics["test_ece"],
            "seconds": seconds,
            "command": self._command(key, name, seed),
        }
        if row.curvature:
            images = unaugmented(trainer.train_dataset, trainer.model)
            surface = LossSurface.of(trainer, images, seed=seed, max_samples=CURVATURE_SAMPLES)
            result["eigenvalue"] = surface.top_eigenvalue().value
        return result

    def _base(self, key: str) -> str:
        def train(folder: Path) -> None:
            trainer = self._trainer(key, "ERM", 0)[0]
            trainer.train()
            trainer.save_model(str(folder))

        return _made_once(key.replace(" ", "_"), train)

    def _command(self, key: str, name: str, seed: int) -> str:
        """As a user would type it, with the data sets from the Hub.

        What no recipe does is called by the class that does it.
        """
        setting, trainer = self.settings[key], self.rows[name].trainer
        recipe = "gtsrb" if setting.folder == "gtsrb" else "cifar10"
        script = f"recipes/train_{recipe}.py" if trainer is AMPTrainer else trainer.__name__
        words = [script, *self.arguments(key, name, seed)[:-2]]
        if setting.dataset == DIGITS:
            words += ["--dataset", DIGITS]
        return shlex.join(word.removeprefix(f"{CACHE}/") for word in words)

    def _times(self, key: str, names: list[str]) -> dict[str, list[float]]:
        """Ratios to ERM's training time in the same round, by row."""
        short = [
            "--num_train_epochs",
            "5",
            "--max_train_samples",
            "2000",
            "--max_eval_samples",
            "10",
        ]
        trainers = {name: self._trainer(key, name, 0, *short)[0] for name in names}
        ratios: dict[str, list[float]] = {name: [] for name in trainers}
        order = list(trainers)
        rounds = range(self.options.rounds)
        for _ in tqdm(rounds, desc=f"timing {key}", unit=" rounds", disable=None):
            seconds = {}
            for name in order:
                begin = time.perf_counter()
                trainers[name].train()
                seconds[name] = time.perf_counter() - begin
            order.append(order.pop(0))  # what changes within a round falls on all
            for name, value in seconds.items():
                ratios[name].append(self.rows[name].epochs * value / seconds["ERM"])
        return ratios

    def _read(self) -> None:
        self.found: dict[str, Any] = {"runs": [], "times": {}}
        if self.path.exists():
            self.found = json.loads(self.path.read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def _latest(self) -> Iterator[dict[str, Any]]:
        """`found`, to be changed: with what other processes have found meanwhile, and then saved.

        The file holds all results at every moment, whatever interrupts the writing.
        """
        with FileLock(f"{self.path}.lock"):
            self._read()
            yield self.found
            written = self.path.with_suffix(".tmp")
            written.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            os.replace(written, self.path)


def mean_and_spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"

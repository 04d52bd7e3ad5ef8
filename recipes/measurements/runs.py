"""Runs of the recipes, and their results in a JSON file: by setting, row and seed.

A run that the file holds is not repeated, so a script that was interrupted continues where it was.
"""

import contextlib
import copy
import json
import os
import runpy
import shlex
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from language_model import LanguageModelJob, predicted_tokens
from meters import machine
from plan import CORRUPTIONS, DIGITS, GTSRB, SECTIONS, Row, RunArguments, Setting, check_names
from tqdm.auto import tqdm
from transformers import PrinterCallback

from amp_hf import AMPTrainer
from amp_hf.flatness import LossSurface
from amp_hf.images import arguments as image_arguments
from amp_hf.images.classification import ImageJob
from amp_hf.job.job import Job
from amp_hf.metrics import compute_metrics, temperature_scaled
from amp_hf.text import arguments as text_arguments

RECIPES = Path(__file__).parents[1]
CACHE = os.path.join(tempfile.gettempdir(), "amp_hf_runs")
UNUSED = os.path.join(CACHE, "unused")
CURVATURE_SAMPLES = 250
RECIPE_OF = {GTSRB: "train_gtsrb.py", SECTIONS: "train_text.py"}  # the others: train_cifar10.py

Cells = Iterable[tuple[str, str]]  # settings and rows


class Runs:
    """Results in a JSON file: one mapping per run in `found["runs"]`, and in `found["times"]`, by
    setting and row, the ratios of training times to ERM's.

    Args:
        options: `settings`, `rows` and `seeds` restrict what is run.
        path: of the file, unless `options.output` names another.

    Raises:
        ValueError: `options` names what does not exist.
    """

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
        check_names("settings", options.settings or (), settings)
        check_names("rows", options.rows or (), rows)
        options.check_data(settings[key] for key in options.settings or ())
        self._read()

    def fill(self, cells: Cells, seeds: Iterable[int]) -> None:
        """Runs what the file does not hold yet."""
        cells = list(cells)
        keys = list(dict.fromkeys(key for key, _ in cells))
        if not self.options.settings:
            self.options.check_data(self.settings[key] for key in keys)
        for key in keys:
            if lack := self.options.lack(self.settings[key]):
                print(f"{key}: left out. {lack}")
        chosen = self._chosen(cells)
        wanted = [(key, row, seed) for seed in self.options.seeds or seeds for key, row in chosen]
        for key, row, seed in tqdm(wanted, unit=" runs", disable=None):
            self._read()  # other processes may write to the file, too
            if seed not in self.by_seed(key, row, "nll"):
                result = self._run(key, row, seed)
                with self._latest() as found:
                    found["runs"].append(result)

    def time(self, cells: Cells) -> None:
        """Times what has not been timed yet, in short trainings.

        Leaves out rows whose radius sets itself: it would leave most of such trainings plain.
        """
        by_setting: dict[str, list[str]] = {}
        for key, name in self._chosen(cells):
            if self.time_ratio(key, name) is None and not self.rows[name].sets_itself:
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

    def without(self, seeds: Iterable[int]) -> "Runs":
        """The same, but for the runs with these seeds."""
        rest = copy.copy(self)
        kept = [run for run in self.found["runs"] if run["seed"] not in seeds]
        rest.found = self.found | {"runs": kept}
        return rest

    def values(self, key: str, name: str, column: str) -> list[float]:
        """One per seed."""
        return list(self.by_seed(key, name, column).values())

    def time_ratio(self, key: str, name: str) -> float | None:
        """The median; `None` if the row was not timed."""
        ratios = self.found["times"].get(key, {}).get(name)
        return statistics.median(ratios) if ratios else None

    def arguments(self, key: str, name: str, seed: int) -> list[str]:
        """The recipe's command line, but for the data set."""
        setting, row = self.settings[key], self.rows[name]
        model = f"--from_scratch --model {setting.network}"
        if setting.base is not None:
            model = f"--model {self._base(setting.base)}"
        elif setting.pretrained:
            model = f"--model {setting.network}"
        epochs = f"--num_train_epochs {setting.epochs * row.epochs:g}"
        own = row.arguments(setting)
        splits = f"--eval_splits {' '.join(CORRUPTIONS)}" if setting.corrupted else ""
        words = f"{model} {setting.argv} {epochs} --seed {seed} {own} {splits} --save_strategy no"
        return words.split()

    def _chosen(self, cells: Cells) -> list[tuple[str, str]]:
        settings = self.options.settings or self.settings
        rows = self.options.rows or self.rows
        return [
            (key, name)
            for key, name in cells
            if key in settings and name in rows and not self.options.lack(self.settings[key])
        ]

    def _job(self, key: str, name: str, seed: int, *more: str) -> Job:
        """Not trained yet."""
        setting, row = self.settings[key], self.rows[name]
        if setting.dataset == DIGITS:
            dataset = _made_once(DIGITS, _save_digits)
        else:
            dataset = self.options.source(setting.dataset)
        quiet = ["--logging_strategy", "no", "--disable_tqdm", "true", "--output_dir", UNUSED]
        argv = [*self.arguments(key, name, seed), "--dataset", dataset, *quiet, *more]
        if setting.pretrained:
            argv += ["--model", self.options.source(setting.network)]
        kind = image_arguments if setting.job is ImageJob else text_arguments
        defaults: tuple[dict, dict] = ({}, {})
        if setting.recipe:
            recipe = runpy.run_path(str(RECIPES / _recipe_of(setting)))
            defaults = recipe["DEFAULTS"], recipe["FROM_SCRATCH_DEFAULTS"]
        job = setting.job(*kind.parse(*defaults, None, argv), row.trainer)
        job.trainer.remove_callback(PrinterCallback)
        return job

    def _run(self, key: str, name: str, seed: int) -> dict[str, Any]:
        if not (self.options.data or self.options.output):
            raise ValueError(
                f"--output must name a new file, or --data local copies: {self.path.name} has runs "
                "on those, and GTSRB from the Hub has fewer images."
            )
        setting, row = self.settings[key], self.rows[name]
        job = self._job(key, name, seed)
        trainer = job.trainer
        test = trainer.eval_dataset if row.held_out else job.tests["test"]
        seconds = trainer.train().metrics["train_runtime"]
        trainer.compute_metrics = None  # computed below, where tokens are in one row
        predicted = trainer.predict(test)
        if setting.job is LanguageModelJob:
            predicted = predicted_tokens(predicted)
        metrics = compute_metrics(predicted)
        scaled = temperature_scaled(predicted.predictions, predicted.label_ids)
        result = {
            "setting": key,
            "row": name,
            "seed": seed,
            **metrics,
            "scaled_nll": scaled["nll"],
            "scaled_ece": scaled["ece"],
            "seconds": seconds,
            "command": self.command(key, name, seed),
            "samples": len(trainer.train_dataset),
            **machine(),
        }
        if setting.corrupted:
            accuracies = {
                name: compute_metrics(trainer.predict(job.tests[name]))["accuracy"]
                for name in CORRUPTIONS
            }
            result |= {"corruptions": accuracies, "corrupted": statistics.mean(accuracies.values())}
        if row.curvature and setting.curvature:
            images = job.unaugmented(trainer.train_dataset, trainer.model)
            surface = LossSurface.of(trainer, images, seed=seed, max_samples=CURVATURE_SAMPLES)
            top = surface.top_eigenvalue()
            if top.converged:
                result["eigenvalue"] = top.value
        return result

    def _base(self, key: str) -> str:
        """The folder of the setting's ERM model."""

        def train(folder: Path) -> None:
            trainer = self._job(key, "ERM", 0).trainer
            trainer.train()
            trainer.save_model(str(folder))

        source = self.options.source(self.settings[key].dataset)
        place = os.path.abspath(source) if os.path.isdir(source) else source  # or on the Hub
        made_of = shlex.join([place, *self.arguments(key, "ERM", 0)])
        return _made_once(f"{zlib.crc32(made_of.encode()):08x}/{key.replace(' ', '_')}", train)

    def command(self, key: str, name: str, seed: int) -> str:
        """As a user types it who takes the data sets from the Hub.

        What no recipe can run begins with its trainer's or its job's name instead.
        """
        setting, trainer = self.settings[key], self.rows[name].trainer
        script = f"recipes/{_recipe_of(setting)}"
        if trainer is not AMPTrainer:
            script = trainer.__name__
        elif setting.job is LanguageModelJob:
            script = LanguageModelJob.__name__
        words = [script, *self.arguments(key, name, seed)]
        if setting.dataset in (DIGITS, SECTIONS):
            words += ["--dataset", setting.dataset]
        names = (os.path.basename(word) if word.startswith(CACHE) else word for word in words)
        return shlex.join(names)

    def _times(self, key: str, names: list[str]) -> dict[str, list[float]]:
        """Ratios to ERM's training time in the same round, by row."""
        short = ["--num_train_epochs=5", "--max_train_samples=2000", "--max_eval_samples=10"]
        trainers = {name: self._job(key, name, 0, *short).trainer for name in names}
        ratios: dict[str, list[float]] = {name: [] for name in trainers}
        order = list(trainers)
        rounds = range(self.options.rounds)
        for _ in tqdm(rounds, desc=f"timing {key}", unit=" rounds", disable=None):
            seconds = {}
            for name in order:
                begin = time.perf_counter()
                trainers[name].train()
                seconds[name] = time.perf_counter() - begin
            order.append(order.pop(0))  # a drift within the rounds then affects all rows alike
            for name, value in seconds.items():
                ratios[name].append(self.rows[name].epochs * value / seconds["ERM"])
        return ratios

    def _read(self) -> None:
        self.found: dict[str, Any] = {"runs": [], "times": {}}
        if self.path.exists():
            self.found = json.loads(self.path.read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def _latest(self) -> Iterator[dict[str, Any]]:
        """`found`, with what other processes have added, to be changed; saved at the end.

        The file is replaced as a whole, so that an interruption cannot damage it.
        """
        with FileLock(f"{self.path}.lock"):
            self._read()
            yield self.found
            written = self.path.with_suffix(".tmp")
            written.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            os.replace(written, self.path)


def _recipe_of(setting: Setting) -> str:
    return RECIPE_OF.get(setting.dataset, "train_cifar10.py")


def _made_once(name: str, make: Callable[[Path], object]) -> str:
    """A folder that all processes share; no process sees it half made."""
    folder = Path(CACHE, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            part = Path(tempfile.mkdtemp(dir=CACHE))
            make(part)
            part.replace(folder)
    return str(folder)


def _save_digits(folder: Path) -> None:
    """The digits of train_digits.py, 1,000 of them to train on, as parquet files."""
    digits = runpy.run_path(str(RECIPES / "train_digits.py"))["digits"]
    parts = digits().train_test_split(train_size=1000, stratify_by_column="label", seed=0)
    for split, rows in parts.items():
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")

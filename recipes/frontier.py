"""What AMP gains for the time it takes, beside ERM given the same time: a table and a plot.

    python recipes/frontier.py                   # all that frontier.json does not hold yet: hours
    python recipes/frontier.py --settings gtsrb --rows ERM "budget 1.15" --seeds 0 1 2
    python recipes/frontier.py --data path/to    # local copies in its folders cifar10 and gtsrb

Trains timm's smallest ResNet from scratch on subsets, on two schedules long enough for ERM to
overfit and on a short one, and tests the last epoch's model on the whole official test set. A run
that is in the file is not repeated, so an interrupted one goes on where it was. Times are measured
apart from that, in short trainings that take turns, `--rounds` of them, as ratios to ERM's in the
same round.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PrinterCallback
from variants import BF16Ascents, LookSAM, MomentumAscent, PreviousGradient

from amp_hf import AMPTrainer
from amp_hf.image_classification import build, parse

HERE = Path(__file__).parent
UNUSED = os.path.join(tempfile.gettempdir(), "amp_hf_frontier")


@dataclass(frozen=True)
class Setting:
    title: str
    dataset: str
    argv: str
    epochs: int

    @property
    def folder(self) -> str:
        return self.dataset.partition("/")[2]


@dataclass(frozen=True)
class Row:
    argv: str
    family: str | None = None  # in the plot
    epochs: float = 1.0  # times the setting's
    trainer: type[AMPTrainer] = AMPTrainer


SETTINGS = {
    "cifar10": Setting(
        "CIFAR-10, 2,000 images, 100 epochs",
        "uoft-cs/cifar10",
        "--max_train_samples 2000 --augment objects",
        100,
    ),
    "gtsrb": Setting(
        "GTSRB, 2,000 images, 60 epochs",
        "tanganke/gtsrb",
        "--max_train_samples 2000 --augment none",
        60,
    ),
    "gtsrb_short": Setting(
        "GTSRB, 10,000 images, 5 epochs",
        "tanganke/gtsrb",
        "--max_train_samples 10000 --augment signs",
        5,
    ),
}
COMMON = "--model test_resnet --from_scratch --save_strategy no"

# The plot's families, in colours of Okabe and Ito (2008), which all can tell apart.
FAMILIES = {
    "ERM": dict(color="#000000", marker="o", linestyle="--"),
    "AMP, every step": dict(color="#D55E00", marker="s", linestyle="none"),
    "AMP for a budget": dict(color="#0072B2", marker="D", linestyle="-"),
    "AMP, last 60 %": dict(color="#F0E442", marker="<", linestyle="none", markeredgecolor="black"),
    "AMP, last 15 %": dict(color="#009E73", marker="^", linestyle="none"),
    "AMP, reused from the start": dict(color="#56B4E9", marker="X", linestyle="none"),
    "AMP, plain between": dict(color="#CC79A7", marker="v", linestyle="none"),
    "AMP, 1/4 of the batch": dict(color="#E69F00", marker="P", linestyle="none"),
}
_ALWAYS = "--ascent_start 0"
ROWS = {
    "ERM": Row("--epsilon 0", "ERM"),
    "ERM, 1.15 × the epochs": Row("--epsilon 0", "ERM", epochs=1.15),
    "ERM, 2 × the epochs": Row("--epsilon 0", "ERM", epochs=2.0),
    "AMP, ε 0.1": Row(_ALWAYS, "AMP, every step"),
    "AMP, ε 0.2": Row(f"{_ALWAYS} --epsilon 0.2", "AMP, every step"),
    "AMP, ε 0.3": Row(f"{_ALWAYS} --epsilon 0.3", "AMP, every step"),
    "AMP in the last 60 %, ε 0.2": Row("--ascent_start 0.4 --epsilon 0.2", "AMP, last 60 %"),
    "budget 1.1": Row("--budget 1.1", "AMP for a budget"),
    "budget 1.15": Row("--budget 1.15", "AMP for a budget"),
    "budget 1.3": Row("--budget 1.3", "AMP for a budget"),
    "last 15 % (the default)": Row("", "AMP, last 15 %"),
    "budget 1.15, ε 0.1": Row("--budget 1.15 --epsilon 0.1"),
    "budget 1.15, ε 0.2": Row("--budget 1.15 --epsilon 0.2"),
    "budget 1.15, ε 0.3": Row("--budget 1.15 --epsilon 0.3"),
    "every 7th step, ε 0.1": Row(f"{_ALWAYS} --ascent_every 7"),
    "every 7th step, ε 0.2": Row(f"{_ALWAYS} --epsilon 0.2 --ascent_every 7", "AMP, plain between"),
    "every 7th step, reused, ε 0.2": Row(
        f"{_ALWAYS} --epsilon 0.2 --ascent_every 7 --ascent_reuse true",
        "AMP, reused from the start",
    ),
    "1/4 of the batch, last 60 %, ε 0.2": Row(
        "--epsilon 0.2 --ascent_start 0.4 --ascent_fraction 0.25", "AMP, 1/4 of the batch"
    ),
    "momentum (MSAM), ε 0.1": Row("--epsilon 0.1", trainer=MomentumAscent),
    "previous gradient, ε 0.1": Row("--epsilon 0.1", trainer=PreviousGradient),
    "LookSAM, every 5th step, ε 0.1": Row("--epsilon 0.1", trainer=LookSAM),
    "ascents in bf16, ε 0.2": Row(f"{_ALWAYS} --epsilon 0.2", trainer=BF16Ascents),
}


@dataclass
class FrontierArguments:
    settings: list[str] = field(default_factory=lambda: list(SETTINGS))
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    seeds: list[int] = field(default_factory=lambda: [10, 11, 12])
    rounds: int = field(default=9, metadata={"help": "Of the timing; 0 leaves it out."})
    data: str | None = field(
        default=None, metadata={"help": "Folder of local copies; else they come from the Hub."}
    )
    output: str = field(
        default=str(HERE / "frontier.json"),
        metadata={"help": "All results; a plot of them, .png, lies beside it."},
    )

    def __post_init__(self) -> None:
        for name, known in (("settings", SETTINGS), ("rows", ROWS)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"--{name} knows {', '.join(known)}, not {unknown[0]!r}.")
        for key in self.settings if self.data else []:
            folder = SETTINGS[key].folder
            if not os.path.isdir(os.path.join(self.data, folder)):
                raise ValueError(
                    f"--data {self.data} has no folder {folder!r}. Pass --data a folder of local "
                    "copies, or leave it out to take the data sets from the Hub."
                )


def arguments(options: FrontierArguments, key: str, row: Row, seed: int) -> list[str]:
    """What the recipe of the setting takes on its command line."""
    setting = SETTINGS[key]
    dataset = os.path.join(options.data, setting.folder) if options.data else setting.dataset
    epochs = f"--num_train_epochs {setting.epochs * row.epochs:g}"
    words = f"{COMMON} {setting.argv} {epochs} --seed {seed} {row.argv}".split()
    return [*words, "--dataset", dataset]


def trainer_of(argv: list[str], row: Row, *more: str):
    quiet = ["--logging_strategy", "no", "--disable_tqdm", "true", "--output_dir", UNUSED]
    parsed = parse({}, {}, None, [*argv, *quiet, *more])
    trainer, tests = build(*parsed, row.trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer, tests["test"]


def result_of(options: FrontierArguments, key: str, name: str, seed: int) -> dict:
    row = ROWS[name]
    argv = arguments(options, key, row, seed)
    trainer, test = trainer_of(argv, row)
    seconds = trainer.train().metrics["train_runtime"]
    metrics = trainer.evaluate(test, metric_key_prefix="test")
    script = f"recipes/train_{SETTINGS[key].folder}.py"
    recipe = script if row.trainer is AMPTrainer else row.trainer.__name__
    return {
        "setting": key,
        "row": name,
        "seed": seed,
        "accuracy": metrics["test_accuracy"],
        "nll": metrics["test_nll"],
        "ece": metrics["test_ece"],
        "seconds": seconds,
        "command": " ".join([recipe, *argv[:-2]]),
    }


def times_of(options: FrontierArguments, key: str) -> dict[str, list[float]]:
    """Ratios to ERM's training time in the same round, by row."""
    short = ["--num_train_epochs", "5", "--max_train_samples", "2000", "--max_eval_samples", "10"]
    trainers = {
        name: trainer_of(arguments(options, key, ROWS[name], 0), ROWS[name], *short)[0]
        for name in dict.fromkeys(["ERM", *options.rows])
    }
    ratios: dict[str, list[float]] = {name: [] for name in trainers}
    order = list(trainers)
    for _ in tqdm(range(options.rounds), desc=f"timing {key}", unit=" rounds", disable=None):
        seconds = {}
        for name in order:
            begin = time.perf_counter()
            trainers[name].train()
            seconds[name] = time.perf_counter() - begin
        order.append(order.pop(0))  # what changes within a round falls on all
        for name, value in seconds.items():
            ratios[name].append(ROWS[name].epochs * value / seconds["ERM"])
    return ratios


def table(found: dict, key: str) -> str:
    """A Markdown table of one setting: mean ± standard deviation over seeds."""
    lines = [
        f"| {SETTINGS[key].title} | time | accuracy, % | NLL | ECE | n |",
        "|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        runs = [run for run in found["runs"] if (run["setting"], run["row"]) == (key, name)]
        if runs:
            ratios = found["times"].get(key, {}).get(name)
            cells = [
                f"{statistics.median(ratios):.2f}" if ratios else "",
                _mean_and_spread([100 * run["accuracy"] for run in runs], 2),
                _mean_and_spread([run["nll"] for run in runs], 3),
                _mean_and_spread([run["ece"] for run in runs], 3),
                str(len(runs)),
            ]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _mean_and_spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def plot(found: dict, path: Path) -> None:
    """Accuracy, NLL and calibration error against training time; bars are standard deviations."""
    columns = {"accuracy": "test accuracy, %", "nll": "test NLL, nats", "ece": "calibration error"}
    keys = [key for key in SETTINGS if any(run["setting"] == key for run in found["runs"])]
    figure, axes = plt.subplots(
        len(keys), 3, figsize=(13, 4.2 * len(keys)), squeeze=False, layout="constrained"
    )
    for key, row_of_axes in zip(keys, axes):
        for (column, label), axis in zip(columns.items(), row_of_axes):
            scale = 100 if column == "accuracy" else 1
            points = {}
            for name in ROWS:
                values = [
                    scale * run[column]
                    for run in found["runs"]
                    if (run["setting"], run["row"]) == (key, name)
                ]
                ratios = found["times"].get(key, {}).get(name)
                if values and ratios:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    points[name] = statistics.median(ratios), statistics.mean(values), spread
            for family, style in FAMILIES.items():
                here = sorted(
                    point for name, point in points.items() if ROWS[name].family == family
                )
                if here:
                    x, y, error = zip(*here)
                    axis.errorbar(x, y, error, label=family, capsize=3, markersize=7, **style)
            axis.set_xlabel("training time, times ERM's")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        row_of_axes[1].set_title(SETTINGS[key].title)
    entries = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels())
    }
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(found: dict, path: Path) -> None:
    """The file holds all results at every moment, whatever interrupts the writing."""
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(written, path)


def main() -> None:
    try:
        (options,) = HfArgumentParser(
            FrontierArguments, description=__doc__
        ).parse_args_into_dataclasses()
    except ValueError as error:
        sys.exit(f"frontier.py: error: {error}")
    path = Path(options.output)
    found = {"runs": [], "times": {}}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    done = {(run["setting"], run["row"], run["seed"]) for run in found["runs"]}
    wanted = [
        (key, row, seed)
        for seed in options.seeds
        for row in options.rows
        for key in options.settings
        if (key, row, seed) not in done
    ]
    try:
        for key, row, seed in tqdm(wanted, unit=" runs", disable=None):
            found["runs"].append(result_of(options, key, row, seed))
            save(found, path)
        for key in options.settings if options.rounds else []:
            found["times"][key] = found["times"].get(key, {}) | times_of(options, key)
            save(found, path)
    except ValueError as error:
        sys.exit(f"frontier.py: error: {error}")
    for key in SETTINGS:
        print(f"\n{table(found, key)}")
    if found["times"]:
        plot(found, path.with_suffix(".png"))
    print(f"\nSaved {path}")


if __name__ == "__main__":
    main()

"""What AMP gains for the time it takes, beside ERM given the same time: a table and a plot.

    python recipes/measurements/frontier.py
    python recipes/measurements/frontier.py --settings gtsrb --rows ERM "budget 1.15" --seeds 0 1 2

Runs all that frontier.json does not hold yet, which takes hours; `--data` is a folder of local
copies, in its folders cifar10 and gtsrb.

Trains timm's smallest ResNet from scratch on subsets, on two schedules long enough for ERM to
overfit and on a short one, and tests the last epoch's model on the whole official test set. A run
that is in the file is not repeated, so an interrupted one goes on where it was. Times are measured
apart from that, in short trainings that take turns, `--rounds` of them, as ratios to ERM's in the
same round.
"""

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from runs import Row, RunArguments, Runs, Setting, mean_and_spread
from transformers import HfArgumentParser
from variants import BF16Ascents, LookSAM, MomentumAscent, PreviousGradient

COMMON = "--model test_resnet --from_scratch"
SETTINGS = {
    "cifar10": Setting(
        "CIFAR-10, 2,000 images, 100 epochs",
        "uoft-cs/cifar10",
        f"{COMMON} --max_train_samples 2000 --augment objects",
        100,
    ),
    "gtsrb": Setting(
        "GTSRB, 2,000 images, 60 epochs",
        "tanganke/gtsrb",
        f"{COMMON} --max_train_samples 2000 --augment none",
        60,
    ),
    "gtsrb_short": Setting(
        "GTSRB, 10,000 images, 5 epochs",
        "tanganke/gtsrb",
        f"{COMMON} --max_train_samples 10000 --augment signs",
        5,
    ),
}
# The plot's families, in colours of Okabe and Ito (2008), which all can tell apart.
FAMILIES = {
    "ERM": dict(color="#000000", marker="o", linestyle="--"),
    "AMP, every step": dict(color="#D55E00", marker="s", linestyle="none"),
    "AMP for a budget": dict(color="#0072B2", marker="D", linestyle="-"),
    "AMP for a budget, at any loss": dict(
        color="#0072B2", marker="D", linestyle=":", markerfacecolor="white"
    ),
    "AMP, last 60 %": dict(color="#F0E442", marker="<", linestyle="none", markeredgecolor="black"),
    "AMP, last 15 %": dict(color="#009E73", marker="^", linestyle="none"),
    "AMP, reused from the start": dict(color="#56B4E9", marker="X", linestyle="none"),
    "AMP, plain between": dict(color="#CC79A7", marker="v", linestyle="none"),
    "AMP, 1/4 of the batch": dict(color="#E69F00", marker="P", linestyle="none"),
}
_ALWAYS = "--ascent_start 0"
_ANY = "--ascent_below inf"
ROWS = {
    "ERM": Row("--epsilon 0", "ERM"),
    "ERM, 1.15 × the epochs": Row("--epsilon 0", "ERM", epochs=1.15),
    "ERM, 2 × the epochs": Row("--epsilon 0", "ERM", epochs=2.0),
    "AMP, ε 0.1": Row(_ALWAYS, "AMP, every step"),
    "AMP, ε 0.2": Row(f"{_ALWAYS} --epsilon 0.2", "AMP, every step"),
    "AMP, ε 0.3": Row(f"{_ALWAYS} --epsilon 0.3", "AMP, every step"),
    "AMP in the last 60 %, ε 0.2": Row("--ascent_start 0.4 --epsilon 0.2", "AMP, last 60 %"),
    "budget 1.15": Row("--budget 1.15", "AMP for a budget"),
    "budget 1.1, at any loss": Row(f"--budget 1.1 {_ANY}", "AMP for a budget, at any loss"),
    "budget 1.15, at any loss": Row(f"--budget 1.15 {_ANY}", "AMP for a budget, at any loss"),
    "budget 1.3, at any loss": Row(f"--budget 1.3 {_ANY}", "AMP for a budget, at any loss"),
    "last 15 % (the default)": Row("", "AMP, last 15 %"),
    "budget 1.15, at any loss, ε 0.1": Row(f"--budget 1.15 {_ANY} --epsilon 0.1"),
    "budget 1.15, at any loss, ε 0.2": Row(f"--budget 1.15 {_ANY} --epsilon 0.2"),
    "budget 1.15, at any loss, ε 0.3": Row(f"--budget 1.15 {_ANY} --epsilon 0.3"),
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
class FrontierArguments(RunArguments):
    seeds: list[int] = field(default_factory=lambda: [10, 11, 12])
    settings: list[str] = field(default_factory=lambda: list(SETTINGS))
    rows: list[str] = field(default_factory=lambda: list(ROWS))

    def __post_init__(self) -> None:
        self.check_names(settings=SETTINGS, rows=ROWS)
        self.check_data(SETTINGS[key] for key in self.settings)


def table(runs: Runs, key: str) -> str:
    """A Markdown table of one setting: mean ± standard deviation over seeds."""
    lines = [
        f"| {SETTINGS[key].title} | time | accuracy, % | NLL | ECE | n |",
        "|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        if accuracies := runs.values(key, name, "accuracy"):
            ratio = runs.time_ratio(key, name)
            cells = [
                f"{ratio:.2f}" if ratio else "",
                mean_and_spread([100 * accuracy for accuracy in accuracies], 2),
                mean_and_spread(runs.values(key, name, "nll"), 3),
                mean_and_spread(runs.values(key, name, "ece"), 3),
                str(len(accuracies)),
            ]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def plot(runs: Runs, path: Path) -> None:
    """Accuracy, NLL and calibration error against training time; bars are standard deviations."""
    columns = {"accuracy": "test accuracy, %", "nll": "test NLL, nats", "ece": "calibration error"}
    keys = [key for key in SETTINGS if runs.values(key, "ERM", "accuracy")]
    figure, axes = plt.subplots(
        len(keys), 3, figsize=(13, 4.2 * len(keys)), squeeze=False, layout="constrained"
    )
    for key, row_of_axes in zip(keys, axes):
        for (column, label), axis in zip(columns.items(), row_of_axes):
            scale = 100 if column == "accuracy" else 1
            points = {}
            for name in ROWS:
                values = [scale * value for value in runs.values(key, name, column)]
                ratio = runs.time_ratio(key, name)
                if values and ratio:
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    points[name] = ratio, statistics.mean(values), spread
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


def main() -> None:
    try:
        (options,) = HfArgumentParser(
            FrontierArguments, description=__doc__, allow_abbrev=False
        ).parse_args_into_dataclasses()
        runs = Runs(SETTINGS, ROWS, options, Path(__file__).with_suffix(".json"))
        cells = [(key, row) for row in options.rows for key in options.settings]
        runs.fill(cells, options.seeds)
        runs.time(cells)
    except ValueError as error:
        sys.exit(f"frontier.py: error: {error}")
    for key in SETTINGS:
        print(f"\n{table(runs, key)}")
    if runs.found["times"]:
        plot(runs, runs.path.with_suffix(".png"))
    print(f"\nSaved {runs.path}")


if __name__ == "__main__":
    main()

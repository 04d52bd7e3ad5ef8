"""What AMP gains for the time it takes, beside ERM given the same time: tables and a plot.

    python recipes/measurements/frontier.py --data path/to/copies
    python recipes/measurements/frontier.py --output runs.json --settings gtsrb --rows ERM
    python recipes/measurements/frontier.py --print_only

Runs all that frontier.json does not hold yet, which takes hours; `--data` is a folder of local
copies, in its folders cifar10 and gtsrb. It trains timm's smallest ResNet from scratch on subsets,
on two schedules long enough for ERM to overfit and on a short one, and tests the model of the last
epoch on the official test set. Times are measured separately, in `--rounds` of short trainings that
take turns, as ratios to ERM's in the same round.
"""

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from plan import CIFAR10, GTSRB, Row, RunArguments, Setting
from runs import Runs
from tables import lines_of
from variants import BF16Ascents, LookSAM, MomentumAscent, PreviousGradient

from amp_hf.job.arguments import new_parser

SETTINGS = {
    "cifar10": Setting(
        "CIFAR-10, 2,000 images, 100 epochs",
        CIFAR10,
        "test_resnet",
        "--max_train_samples 2000 --augment objects",
        100,
    ),
    "gtsrb": Setting(
        "GTSRB, 2,000 images, 60 epochs",
        GTSRB,
        "test_resnet",
        "--max_train_samples 2000 --augment none",
        60,
    ),
    "gtsrb_short": Setting(
        "GTSRB, 10,000 images, 5 epochs",
        GTSRB,
        "test_resnet",
        "--max_train_samples 10000 --augment signs",
        5,
    ),
}
# The plot's families, in the colours of Okabe and Ito (2008), which colour-blind readers can tell
# apart.
FAMILIES = {
    "ERM": dict(color="#000000", marker="o", linestyle="--"),
    "AMP, every step": dict(color="#D55E00", marker="s", linestyle="none"),
    "AMP, last 60 %, reused": dict(
        color="#0072B2", marker="D", linestyle=":", markerfacecolor="white"
    ),
    "AMP, last 60 %": dict(color="#F0E442", marker="<", linestyle="none", markeredgecolor="black"),
    "AMP, last 15 %": dict(color="#009E73", marker="^", linestyle="none"),
    "AMP, reused from the start": dict(color="#56B4E9", marker="X", linestyle="none"),
    "AMP, plain between": dict(color="#CC79A7", marker="v", linestyle="none"),
    "AMP, 1/4 of the batch": dict(color="#E69F00", marker="P", linestyle="none"),
}
LAST_60, LAST_15 = "--ascent_start 0.4", "--ascent_start 0.85"
REUSED = f"{LAST_60} --ascent_reuse true --ascent_every"
ROWS = {
    "ERM": Row(epsilon=0, family="ERM"),
    "ERM, 1.15 × the epochs": Row(epsilon=0, family="ERM", epochs=1.15),
    "ERM, 2 × the epochs": Row(epsilon=0, family="ERM", epochs=2.0),
    "AMP, ε 0.1": Row(epsilon=0.1, family="AMP, every step"),
    "AMP, ε 0.2": Row(epsilon=0.2, family="AMP, every step"),
    "AMP, ε 0.3": Row(epsilon=0.3, family="AMP, every step"),
    "AMP in the last 60 %, ε 0.2": Row(LAST_60, 0.2, family="AMP, last 60 %"),
    "every 6th, reused, ε 0.7": Row(f"{REUSED} 6", 0.7, family="AMP, last 60 %, reused"),
    "every 4th, reused, ε 0.7": Row(f"{REUSED} 4", 0.7, family="AMP, last 60 %, reused"),
    "every 2nd, reused, ε 0.7": Row(f"{REUSED} 2", 0.7, family="AMP, last 60 %, reused"),
    "AMP in the last 15 %, ε 0.1": Row(LAST_15, 0.1, family="AMP, last 15 %"),
    "every 4th, reused, ε 0.1": Row(f"{REUSED} 4", 0.1),
    "every 4th, reused, ε 0.2": Row(f"{REUSED} 4", 0.2),
    "every 4th, reused, ε 0.3": Row(f"{REUSED} 4", 0.3),
    "every 7th step, ε 0.1": Row("--ascent_every 7", 0.1),
    "every 7th step, ε 0.2": Row("--ascent_every 7", 0.2, family="AMP, plain between"),
    "every 7th step, reused, ε 0.2": Row(
        "--ascent_every 7 --ascent_reuse true", 0.2, family="AMP, reused from the start"
    ),
    "1/4 of the batch, last 60 %, ε 0.2": Row(
        f"{LAST_60} --ascent_fraction 0.25", 0.2, family="AMP, 1/4 of the batch"
    ),
    "momentum (MSAM), ε 0.1": Row(epsilon=0.1, trainer=MomentumAscent),
    "previous gradient, ε 0.1": Row(epsilon=0.1, trainer=PreviousGradient),
    "LookSAM, every 5th step, ε 0.1": Row(epsilon=0.1, trainer=LookSAM),
    "ascents in bf16, ε 0.2": Row(epsilon=0.2, trainer=BF16Ascents),
}


def table(runs: Runs, key: str) -> str:
    """Mean ± standard deviation over seeds, of one setting."""
    lines = [
        f"| {SETTINGS[key].title} | time | accuracy, % | NLL | ECE | n |",
        "|---|---|---|---|---|---|",
        *lines_of(runs, key, ROWS, ("accuracy", "nll", "ece")),
    ]
    return "\n".join(lines)


def plot(runs: Runs, path: Path) -> None:
    """Accuracy, NLL and calibration error against training time; bars are standard deviations."""
    columns = {"accuracy": "test accuracy, %", "nll": "test NLL, nats", "ece": "calibration error"}
    keys = [key for key in SETTINGS if any(runs.values(key, name, "accuracy") for name in ROWS)]
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
        (options,) = new_parser(RunArguments, __doc__).parse_args_into_dataclasses()
        runs = Runs(SETTINGS, ROWS, options, Path(__file__).with_suffix(".json"))
        cells = [(key, name) for name in ROWS for key in SETTINGS]
        if not options.print_only:
            runs.fill(cells, seeds=[10, 11, 12])
            runs.time(cells)
    except ValueError as error:
        sys.exit(f"frontier.py: error: {error}")
    for key in SETTINGS:
        print(f"\n{table(runs, key)}")
    if runs.found["times"]:
        plot(runs, runs.path.with_suffix(".png"))
    print(f"\nAll runs: {runs.path}")


if __name__ == "__main__":
    main()

"""AMP beside ERM on several networks, data sets and schedules: the tables of README.md.

    python recipes/measurements/erm_comparison.py
    python recipes/measurements/erm_comparison.py --tables results --data path/to/copies

Runs all that erm_comparison.json does not hold yet, which takes hours; `--data` is a folder of
local copies, in its folders cifar10 and gtsrb.

`choice` picks ε for AMP at every step on a fifth of the training set, held out; `results`
compares on the official test sets; `defaults` looks for one setting that suits all schedules;
`sketches` shows others, that soon proved not to, with one seed; `grid` shows how ε, ζ and N
behave, on held-out images, too. The last epoch's model is tested. Several processes may fill the
same file, with `--seeds`, `--tables`, `--settings` or `--rows` of their own.
"""

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from runs import DIGITS, Row, RunArguments, Runs, Setting, mean_and_spread
from transformers import HfArgumentParser
from variants import RateFollowingRadius

CIFAR, GTSRB = "uoft-cs/cifar10", "tanganke/gtsrb"
SMALL = "--from_scratch --model test_resnet"
VIT = (
    '--from_scratch --model test_vit --model_args {"patch_size":8} --optim adamw_torch_fused '
    "--learning_rate 0.001 --weight_decay 0.05 --max_grad_norm 1"
)
FEW = "--max_train_samples 2000 --augment none"
MANY = "--max_train_samples 10000"
DIGITS_ARGV = "--augment none --per_device_train_batch_size 32"

SETTINGS = {
    "gtsrb test_resnet": Setting(
        "GTSRB, 2,000 images, 60 epochs", GTSRB, f"{SMALL} {FEW}", 60, epsilon=0.4
    ),
    "cifar10 test_resnet": Setting(
        "CIFAR-10, 2,000 images, 60 epochs",
        CIFAR,
        f"{SMALL} --max_train_samples 2000 --augment objects",
        60,
        epsilon=0.1,
    ),
    "gtsrb resnet18": Setting(
        "GTSRB, 2,000 images, 40 epochs",
        GTSRB,
        f"--from_scratch --model resnet18 {FEW}",
        40,
        epsilon=0.1,
    ),
    "gtsrb test_resnet full": Setting(
        "GTSRB, all 39,209 images, 10 epochs", GTSRB, SMALL, 10, epsilon=0.05
    ),
    "cifar10 test_resnet full": Setting(
        "CIFAR-10, all 50,000 images, 20 epochs", CIFAR, f"{SMALL} --augment none", 20, epsilon=0.2
    ),
    "gtsrb test_vit": Setting(
        "GTSRB, 1,000 images, 120 epochs",
        GTSRB,
        f"{VIT} --max_train_samples 1000 --augment none",
        120,
        epsilon=0.02,
    ),
    "cifar10 test_vit": Setting(
        "CIFAR-10, 2,000 images, 60 epochs", CIFAR, f"{VIT} {FEW}", 60, epsilon=0.05
    ),
    "digits test_resnet": Setting(
        "digits, 200 images, 60 epochs",
        DIGITS,
        f"{SMALL} {DIGITS_ARGV} --max_train_samples 200",
        60,
    ),
    "digits test_vit": Setting(
        "digits, 200 images, 60 epochs", DIGITS, f"{VIT} {DIGITS_ARGV} --max_train_samples 200", 60
    ),
    "gtsrb test_resnet short": Setting(
        "GTSRB, 10,000 images, 5 epochs", GTSRB, f"{SMALL} {MANY} --augment signs", 5
    ),
    "cifar10 test_resnet short": Setting(
        "CIFAR-10, 10,000 images, 5 epochs", CIFAR, f"{SMALL} {MANY} --augment objects", 5
    ),
    "gtsrb test_vit short": Setting(
        "GTSRB, 10,000 images, 5 epochs", GTSRB, f"{VIT} {MANY} --augment signs", 5
    ),
    "cifar10 test_vit short": Setting(
        "CIFAR-10, 10,000 images, 5 epochs", CIFAR, f"{VIT} {MANY} --augment objects", 5
    ),
    "gtsrb test_resnet tuned": Setting(
        "GTSRB, 2,000 images, 20 epochs from a trained model",
        GTSRB,
        f"{FEW} --image_size 32 --learning_rate 0.01",
        20,
        base="gtsrb test_resnet short",
    ),
    "digits test_resnet short": Setting(
        "digits, 1,000 images, 3 epochs", DIGITS, f"{SMALL} {DIGITS_ARGV}", 3
    ),
    "digits test_vit short": Setting(
        "digits, 1,000 images, 3 epochs", DIGITS, f"{VIT} {DIGITS_ARGV}", 3
    ),
}

_HELD_OUT = "--validation_fraction 0.2 --ascent_start 0"
_BUDGET = "--budget 1.15"
_AT_ANY_LOSS = f"{_BUDGET} --ascent_below inf"
ROWS = {
    "ERM": Row("--epsilon 0", curvature=True),
    "AMP": Row("--ascent_start 0 --epsilon {epsilon}", curvature=True),
    "ERM, 2 × the epochs": Row("--epsilon 0", epochs=2.0, curvature=True),
    "last 15 %, ε 0.1": Row("--ascent_start 0.85 --epsilon 0.1"),
    "budget 1.15": Row(_BUDGET, curvature=True),
    "budget 1.15, below 0.1": Row(f"{_BUDGET} --ascent_below 0.1", curvature=True),
    "budget 1.15, at any loss": Row(_AT_ANY_LOSS),
    "budget 1.15, at any loss, relative ε 0.05": Row(
        f"{_AT_ANY_LOSS} --ball relative --epsilon 0.05"
    ),
    "budget 1.15, at any loss, ε follows the rate": Row(_AT_ANY_LOSS, trainer=RateFollowingRadius),
    "held out, ERM": Row("--validation_fraction 0.2 --epsilon 0"),
}
for epsilon in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8):
    ROWS[f"held out, ε {epsilon}"] = Row(f"{_HELD_OUT} --epsilon {epsilon}")
for epsilon in (0.1, 0.4):
    name = f"held out, ε {epsilon}, N 2"
    ROWS[name] = Row(f"{_HELD_OUT} --epsilon {epsilon} --inner_steps 2")
for rate in (0.03, 0.1):
    name = f"held out, ε 0.2, ζ {rate}"
    ROWS[name] = Row(f"{_HELD_OUT} --epsilon 0.2 --inner_lr {rate}")
RESULTS = ("ERM", "AMP", "budget 1.15", "ERM, 2 × the epochs")
DEFAULTS = ("last 15 %, ε 0.1", "budget 1.15", "budget 1.15, below 0.1")
SKETCHES = tuple(name for name in ROWS if "at any loss" in name)
TRIED = {
    "gtsrb test_resnet full": (0.02, 0.05, 0.1, 0.2),
    "cifar10 test_resnet full": (0.05, 0.1, 0.2, 0.4),
    "gtsrb test_resnet": (0.1, 0.2, 0.4),
    "cifar10 test_resnet": (0.1, 0.2, 0.4),
    "gtsrb resnet18": (0.05, 0.1, 0.2, 0.4),
    "gtsrb test_vit": (0.02, 0.05, 0.1),
    "cifar10 test_vit": (0.02, 0.05, 0.1),
}
COMPARED = list(TRIED)
SEARCHED = [key for key in SETTINGS if not key.endswith(("tuned", "full", "resnet18"))]
SKETCHED = ("gtsrb test_resnet", "gtsrb test_resnet short", "gtsrb test_vit")
GRID = {
    "gtsrb test_resnet short": "a short schedule",
    "gtsrb test_resnet": "a long schedule",
    "gtsrb test_resnet tuned": "fine-tuning",
}
_GRID_EPSILONS = (0.05, 0.1, 0.2, 0.4, 0.8)

# Of each table, its seeds and its settings and rows.
_THREE = [10, 11, 12]
TABLES = {
    "choice": (
        [0],
        [(key, f"held out, ε {epsilon}") for key, values in TRIED.items() for epsilon in values],
    ),
    "results": (_THREE, [(key, row) for row in RESULTS for key in COMPARED]),
    "defaults": (_THREE, [(key, row) for row in ("ERM", *DEFAULTS) for key in SEARCHED]),
    "sketches": ([10], [(key, row) for row in SKETCHES for key in SKETCHED]),
    "grid": (
        [0],
        [
            (key, row)
            for row in ROWS
            if row.startswith("held out") and "0.02" not in row
            for key in GRID
        ],
    ),
}


def results_table(runs: Runs) -> str:
    """Mean ± standard deviation over seeds."""
    lines = [
        "| | time | accuracy, % | NLL | ECE | largest eigenvalue | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in COMPARED:
        if not runs.values(key, "ERM", "accuracy"):
            continue
        setting = SETTINGS[key]
        lines.append(f"| **{key.split()[1]}: {setting.title}** | | | | | | |")
        for name in RESULTS:
            if accuracies := runs.values(key, name, "accuracy"):
                ratio = runs.time_ratio(key, name)
                cells = [
                    f"{name}, ε {setting.epsilon:g}" if name == "AMP" else name,
                    f"{ratio:.2f}" if ratio else "",
                    mean_and_spread([100 * accuracy for accuracy in accuracies], 2),
                    mean_and_spread(runs.values(key, name, "nll"), 3),
                    mean_and_spread(runs.values(key, name, "ece"), 3),
                    mean_and_spread(runs.values(key, name, "eigenvalue"), 1),
                    str(len(accuracies)),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choice_table(runs: Runs) -> str:
    """Accuracy and NLL on held-out images, by ε."""
    values = sorted({epsilon for tried in TRIED.values() for epsilon in tried})
    lines = [
        f"| | {' | '.join(f'ε {epsilon:g}' for epsilon in values)} |",
        "|---" * (1 + len(values)) + "|",
    ]
    for key in COMPARED:
        cells = []
        for epsilon in values:
            name = f"held out, ε {epsilon}"
            found = [
                (100 * accuracy, nll)
                for accuracy, nll in zip(
                    runs.values(key, name, "accuracy"), runs.values(key, name, "nll")
                )
            ]
            text = f"{found[0][0]:.1f}, {found[0][1]:.3f}" if found else ""
            cells.append(f"**{text}**" if found and epsilon == SETTINGS[key].epsilon else text)
        network, title = key.split()[1], SETTINGS[key].title
        lines.append(f"| {network}: {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def defaults_table(runs: Runs) -> str:
    """Differences to ERM of the same seed, mean ± standard deviation: points, NLL and ECE."""
    tried = (*DEFAULTS, *SKETCHES)
    lines = [f"| | ERM | {' | '.join(tried)} |", "|---" * (2 + len(tried)) + "|"]
    columns = (("accuracy", 100, 1), ("nll", 1, 3), ("ece", 1, 3))
    for key in SEARCHED:
        cells = []
        for name in ("ERM", *tried):
            parts = []
            for column, scale, digits in columns:
                values = runs.by_seed(key, name, column)
                if name != "ERM":
                    erm = runs.by_seed(key, "ERM", column)
                    values = {seed: values[seed] - erm[seed] for seed in values if seed in erm}
                if values:
                    scaled = [scale * value for value in values.values()]
                    text = mean_and_spread(scaled, digits)
                    parts.append(text if name == "ERM" or text[0] == "-" else f"+{text}")
            n = len(runs.by_seed(key, name, "nll"))
            text = "<br>".join(parts).replace("-", "−")
            cells.append(f"{text}<br>n = {n}" if n == 1 else text)
        lines.append(f"| {key.split()[1]}: {SETTINGS[key].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_grid(runs: Runs, path: Path) -> None:
    """Held-out accuracy and NLL against ε, for N = 1 and 2, and at one ε for smaller ζ."""
    series = {
        "N = 1, ζ = 1": dict(color="#D55E00", marker="o"),
        "N = 2": dict(color="#0072B2", marker="s"),
        "ζ = 0.1, 0.03": dict(color="#009E73", marker="^", linestyle="none"),
    }
    figure, axes = plt.subplots(2, len(GRID), figsize=(12, 6.5), layout="constrained", sharex=True)
    rows = (("accuracy", "accuracy, %", 100), ("nll", "NLL, nats", 1))
    for column, (key, title) in enumerate(GRID.items()):
        axes[0, column].set_title(title)
        for axis, (name, label, scale) in zip(axes[:, column], rows):
            for text, style in series.items():
                points = {}
                for row in TABLES["grid"][1]:
                    found = [scale * value for value in runs.values(key, row[1], name)]
                    kind = "ζ" if "ζ" in row[1] else "N = 2" if "N 2" in row[1] else "N = 1"
                    if row[0] == key and found and "ε" in row[1] and text.startswith(kind):
                        epsilon = float(row[1].split("ε ")[1].split(",")[0])
                        points.setdefault(epsilon, []).append(statistics.mean(found))
                xy = sorted((epsilon, y) for epsilon, ys in points.items() for y in ys)
                if xy:
                    axis.plot(*zip(*xy), label=text, **style)
            if erm := runs.values(key, "held out, ERM", name):
                mean = scale * statistics.mean(erm)
                axis.axhline(mean, color="black", linestyle="--", label="ERM")
            axis.set_xscale("log")
            axis.set_xticks(_GRID_EPSILONS, [f"{epsilon:g}" for epsilon in _GRID_EPSILONS])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_ylabel(label)
        axes[1, column].set_xlabel("ε")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)
    plt.close(figure)


@dataclass
class ComparisonArguments(RunArguments):
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Default: 0 for choice and grid, 10 to 12 for the others."}
    )
    tables: list[str] = field(default_factory=lambda: list(TABLES))
    settings: list[str] = field(default_factory=lambda: list(SETTINGS))
    rows: list[str] = field(default_factory=lambda: list(ROWS))

    def __post_init__(self) -> None:
        self.check_names(tables=TABLES, settings=SETTINGS, rows=ROWS)
        self.check_data(SETTINGS[key] for key in self.settings)


def main() -> None:
    try:
        (options,) = HfArgumentParser(
            ComparisonArguments, description=__doc__, allow_abbrev=False
        ).parse_args_into_dataclasses()
        runs = Runs(SETTINGS, ROWS, options, Path(__file__).with_suffix(".json"))
        for name in options.tables:
            seeds, cells = TABLES[name]
            wanted = [
                (key, row) for key, row in cells if key in options.settings and row in options.rows
            ]
            runs.fill(wanted, options.seeds or seeds)
            if name == "results":
                runs.time(wanted)
    except ValueError as error:
        sys.exit(f"erm_comparison.py: error: {error}")
    for table in (choice_table, results_table, defaults_table):
        print(f"\n{table(runs)}")
    draw_grid(runs, runs.path.with_name(f"{runs.path.stem}_grid.png"))
    print(f"\nSaved {runs.path}")


if __name__ == "__main__":
    main()

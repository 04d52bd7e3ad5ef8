"""AMP compared with ERM on several networks, data sets and schedules: tables and two pictures.

    python recipes/measurements/erm_comparison.py --data path/to/copies
    python recipes/measurements/erm_comparison.py --tables results --output my_runs.json
    python recipes/measurements/erm_comparison.py --print_only

Runs all that erm_comparison.json, or the file that `--output` names, does not hold yet, which takes
days, and tests the model of the last epoch. `--data` is a folder of local copies, in its folders
cifar10, gtsrb, debian_sections and all-MiniLM-L6-v2. Several processes may write to the same file,
each with its own `--seeds`, `--tables`, `--settings` or `--rows`. The tables:

    choice      choose ε for AMP at every step, on a fifth of the training set, held out
    results     compare on the official test sets
    defaults    one setting for every network and every schedule, long and short
    rises       half and a quarter of the default `rise`, where it loses or epochs are few
    recipes     train_gtsrb.py and train_cifar10.py from scratch, as they are
                (GTSRB's at 32 pixels, too)
    others      what else a user might take, and AMP() together with it
    grid        how ε, ζ and N behave, on held-out images
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from cost_plot import draw_costs
from erm_settings import (
    ALTERNATIVES,
    AS_RECIPES,
    COMPARED,
    DEFAULTS,
    ELEMENTWISE,
    FURTHER,
    HELD_OUT,
    HELD_OUT_ERM,
    ONCE,
    RESULTS,
    ROWS,
    SCHEDULES,
    SETTINGS,
    SMALLER_RATE,
    SMALLER_RISES,
    TRIED,
    TWICE,
    held_out,
)
from plan import RunArguments, check_names
from runs import Runs
from tables import line, lines_of, mean_and_spread

from amp_hf.job.arguments import new_parser

GRID = {
    "gtsrb test_resnet short": "a short schedule",
    "gtsrb test_resnet": "a long schedule",
    "gtsrb test_resnet tuned": "fine-tuning",
}
GRID_EPSILONS = (0.05, 0.1, 0.2, 0.4, 0.8)
GRID_ROWS = [name for name, row in HELD_OUT.items() if row.epsilon in (0, *GRID_EPSILONS)]
STYLES = {
    ONCE: dict(color="#D55E00", marker="o"),
    TWICE: dict(color="#0072B2", marker="s"),
    SMALLER_RATE: dict(color="#009E73", marker="^", linestyle="none"),
}

EVERYWHERE = [*SCHEDULES, "gtsrb resnet18", *FURTHER]
RECIPE_ROWS = [name for name in (RESULTS | ALTERNATIVES) if not ROWS[name].chosen_epsilon]
SMALL_SETTINGS = ("gtsrb test_resnet", "cifar10 test_resnet", "gtsrb test_vit", "cifar10 test_vit")
COLUMNS = {"accuracy": "accuracy, %", "nll": "NLL", "scaled_nll": "NLL, scaled", "ece": "ECE"}
WITHOUT_TUNING = (*DEFAULTS, ELEMENTWISE)
LONG = (*COMPARED, "digits test_resnet", "digits test_vit", "cifar10 preactresnet18")
WITH_SMALLER_RISES = ("digits test_vit", "gtsrb efficientnet")

# Of each table: its seeds, its settings and rows.
THREE, MORE = [10, 11, 12], [13, 14]
FIVE = THREE + MORE
TABLES = {
    "choice": ([0], [(key, held_out(epsilon)) for key in TRIED for epsilon in TRIED[key]]),
    "results": (FIVE, [(key, name) for name in RESULTS for key in COMPARED]),
    "defaults": (
        FIVE,
        [(key, name) for name in ("ERM", *WITHOUT_TUNING) for key in EVERYWHERE]
        + [(key, "AMP") for key in EVERYWHERE if key in TRIED],
    ),
    "others": (THREE, [(key, name) for name in ALTERNATIVES for key in SMALL_SETTINGS]),
    "rises": (
        FIVE,
        [(key, name) for name in ("ERM", "AMP()", *SMALLER_RISES) for key in WITH_SMALLER_RISES],
    ),
    "recipes": (THREE, [(key, name) for name in RECIPE_ROWS for key in AS_RECIPES]),
    "grid": ([0], [(key, name) for name in GRID_ROWS for key in GRID]),
}


def results_table(runs: Runs) -> str:
    """Mean ± standard deviation over seeds."""
    lines = [
        "| | time | accuracy, % | NLL | ECE | largest eigenvalue | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in COMPARED:
        if found := lines_of(runs, key, RESULTS, ("accuracy", "nll", "ece", "eigenvalue")):
            lines += [f"| **{_title(key)}** | | | | | | |", *found]
    return "\n".join(lines)


def summary_table(runs: Runs) -> str:
    """ERM, and differences to ERM with the same seed, where networks train for long."""
    names = (*DEFAULTS, "AMP", "ERM, 2 × the epochs")
    return _differences(runs, LONG, names, ("accuracy", "nll"))


def fine_tuning_table(runs: Runs) -> str:
    """The same, where pretrained networks are fine-tuned on few samples."""
    keys = [key for key in FURTHER if SETTINGS[key].pretrained]
    return _differences(runs, keys, (*DEFAULTS, "AMP"))


def alternatives_table(runs: Runs) -> str:
    """The same for what else a user might take."""
    names = (*DEFAULTS, *(name for name in ALTERNATIVES if not name.endswith(", AMP()")))
    runs = runs.without(MORE)
    return _differences(runs, SMALL_SETTINGS, names, ("accuracy", "nll"), usual=len(THREE))


def choice_table(runs: Runs) -> str:
    """Accuracy and NLL on held-out images, by ε."""
    values = sorted({epsilon for tried in TRIED.values() for epsilon in tried})
    lines = [
        f"| | {' | '.join(f'ε {epsilon:g}' for epsilon in values)} |",
        "|---" * (1 + len(values)) + "|",
    ]
    for key in TRIED:
        cells = []
        for epsilon in values:
            found = [runs.values(key, held_out(epsilon), column) for column in ("accuracy", "nll")]
            texts = [f"{100 * accuracy:.1f}, {nll:.3f}" for accuracy, nll in zip(*found)]
            text = texts[0] if texts else ""
            chosen = text and epsilon == SETTINGS[key].epsilon
            cells.append(f"**{text}**" if chosen else text)
        lines.append(line([_title(key), *cells]))
    return "\n".join(lines)


def defaults_table(runs: Runs) -> str:
    """ERM, and the others' differences to ERM with the same seed: accuracy in points, NLL, ECE."""
    return _differences(runs, EVERYWHERE, (*WITHOUT_TUNING, "AMP"))


def rises_table(runs: Runs) -> str:
    """The same, for smaller rises."""
    return _differences(runs, WITH_SMALLER_RISES, ("AMP()", *SMALLER_RISES))


def others_table(runs: Runs) -> str:
    """What else a user might take, beside ERM and AMP with the same seeds."""
    keys = _with_others(runs, SMALL_SETTINGS)
    return _untimed_table(runs.without(MORE), keys, ("ERM", *DEFAULTS, *ALTERNATIVES))


def _with_others(runs: Runs, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if any(runs.values(key, name, "nll") for name in ALTERNATIVES)]


def recipes_table(runs: Runs) -> str:
    """The recipes as they are, and with everything else in AMP's place."""
    more = {"corrupted": "accuracy on corrupted images, %"}
    return _untimed_table(runs, AS_RECIPES, RECIPE_ROWS, COLUMNS | more)


def _untimed_table(
    runs: Runs, keys: Iterable[str], rows: Iterable[str], columns: dict[str, str] = COLUMNS
) -> str:
    """Mean ± standard deviation over seeds."""
    lines = []
    for key in keys:
        if found := lines_of(runs, key, rows, columns, timed=False):
            lines += [f"| **{_title(key)}** |{' |' * (1 + len(columns))}", *found]
    head = [f"| {line([*columns.values(), 'n'])}", f"|{'---|' * (2 + len(columns))}"]
    return "\n".join(head + lines if lines else ())


def _differences(
    runs: Runs,
    keys: Iterable[str],
    names: Sequence[str],
    columns: Sequence[str] = ("accuracy", "nll", "ece"),
    usual: int = len(FIVE),
) -> str:
    """Cells of another number of seeds than the usual one name it."""
    lines = [f"| | ERM | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for key in keys:
        if runs.values(key, "ERM", "nll"):
            cells = (_difference(runs, key, name, columns, usual) for name in ("ERM", *names))
            lines.append(line([_title(key), *cells]))
    return "\n".join(lines)


def _difference(runs: Runs, key: str, name: str, columns: Sequence[str], usual: int) -> str:
    parts, n = [], 0
    for column in columns:
        factor, digits = (100, 1) if column == "accuracy" else (1, 3)
        values = runs.by_seed(key, name, column)
        if name != "ERM":
            erm = runs.by_seed(key, "ERM", column)
            values = {seed: values[seed] - erm[seed] for seed in values if seed in erm}
        if values:
            scaled = [factor * value for value in values.values()]
            parts.append(mean_and_spread(scaled, digits, sign="" if name == "ERM" else "+"))
            n = len(values)
    if parts and runs.rows[name].chosen_epsilon:
        parts.append(f"ε {runs.settings[key].epsilon:g}")
    if n not in (0, usual):
        parts.append(f"n = {n}")
    return "<br>".join(parts).replace("-", "−")


def _title(key: str) -> str:
    return f"{SETTINGS[key].network.rpartition('/')[2]}: {SETTINGS[key].title}"


def draw_grid(runs: Runs, path: Path) -> None:
    """Held-out accuracy and NLL against ε, for N = 1 and 2, and at one ε for smaller ζ."""
    figure, axes = plt.subplots(2, len(GRID), figsize=(12, 6.5), layout="constrained", sharex=True)
    columns = (("accuracy", "accuracy, %", 100), ("nll", "NLL, nats", 1))
    for axes_of_key, (key, title) in zip(axes.T, GRID.items()):
        axes_of_key[0].set_title(title)
        for axis, (column, label, factor) in zip(axes_of_key, columns):
            means = {
                name: statistics.mean(factor * value for value in values)
                for name in GRID_ROWS
                if (values := runs.values(key, name, column))
            }
            for family, style in STYLES.items():
                names = [name for name in means if ROWS[name].family == family]
                if points := sorted((ROWS[name].epsilon, means[name]) for name in names):
                    axis.plot(*zip(*points), label=family, **style)
            if HELD_OUT_ERM in means:
                axis.axhline(means[HELD_OUT_ERM], color="black", linestyle="--", label="ERM")
            axis.set_xscale("log")
            axis.set_xticks(GRID_EPSILONS, [f"{epsilon:g}" for epsilon in GRID_EPSILONS])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_ylabel(label)
        axes_of_key[1].set_xlabel("ε")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)
    plt.close(figure)


TO_PRINT = (
    summary_table,
    fine_tuning_table,
    alternatives_table,
    choice_table,
    results_table,
    defaults_table,
    rises_table,
    others_table,
    recipes_table,
)


def _picture(runs: Runs, name: str) -> Path:
    return runs.path.with_name(f"{runs.path.stem}_{name}.png")


@dataclass
class ComparisonArguments(RunArguments):
    tables: list[str] = field(
        default_factory=lambda: list(TABLES),
        metadata={"help": "The tables whose runs are made, of those above."},
    )

    def __post_init__(self) -> None:
        check_names("tables", self.tables, TABLES)


def main() -> None:
    try:
        (options,) = new_parser(ComparisonArguments, __doc__).parse_args_into_dataclasses()
        runs = Runs(SETTINGS, ROWS, options, Path(__file__).with_suffix(".json"))
        for name in () if options.print_only else options.tables:
            seeds, cells = TABLES[name]
            runs.fill(cells, seeds)
            if name == "results":
                runs.time(cells)
    except ValueError as error:
        sys.exit(f"erm_comparison.py: error: {error}")
    for table in TO_PRINT:
        print(f"\n{table(runs)}")
    if any(run["row"] in HELD_OUT for run in runs.found["runs"]):
        draw_grid(runs, _picture(runs, "grid"))
    if keys := _with_others(runs, (*SMALL_SETTINGS, *AS_RECIPES)):
        draw_costs(runs.without(MORE), keys, (*RESULTS, *ALTERNATIVES), _picture(runs, "cost"))
    print(f"\nAll runs: {runs.path}")


if __name__ == "__main__":
    main()

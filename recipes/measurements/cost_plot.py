"""What a regularizer gains for what it costs, drawn."""

import statistics
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from runs import Runs
from tables import row_label

PANELS = {"accuracy": "test accuracy, %", "nll": "test NLL, nats", "ece": "calibration error (ECE)"}
AMP, OTHER = "#D55E00", "#0072B2"
APART = 0.052  # of an axis's height: how far apart two labels are at least


def draw_costs(runs: Runs, keys: Iterable[str], names: Iterable[str], path: Path) -> None:
    """Accuracy, NLL and ECE of rows against their passes, a line of panels for each setting.

    Bars are standard deviations over seeds. The rows of AMP alone have a color of their own.
    """
    keys, names = list(keys), list(names)
    figure, axes = plt.subplots(
        len(keys), len(PANELS), figsize=(15, 5 * len(keys)), squeeze=False, layout="constrained"
    )
    drawn = []
    for key, of_key in zip(keys, axes):
        for (column, label), axis in zip(PANELS.items(), of_key):
            scale = 100 if column == "accuracy" else 1
            found = {
                name: [scale * value for value in values]
                for name in names
                if (values := runs.values(key, name, column))
            }
            for name, values in found.items():
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                axis.errorbar(
                    runs.rows[name].passes,
                    statistics.mean(values),
                    spread,
                    color=_color(name),
                    marker="o",
                    capsize=3,
                )
            axis.set_xlim(0.95, 2.55)
            axis.set_xticks([1, 1.15, 1.8, 2], ["1", "1.15", "1.8", "2"])
            axis.set_xlabel("passes, times ERM's")
            axis.set_ylabel(label)
            axis.margins(y=0.1)
            if column == "ece":
                axis.set_yscale("log")
            axis.grid(alpha=0.3)
            drawn.append((axis, runs, key, found))
        setting = runs.settings[key]
        of_key[1].set_title(f"{setting.network}: {setting.title}")
    figure.draw_without_rendering()  # where the panels lie
    for panel in drawn:
        _write_names(*panel)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _color(name: str) -> str:
    if name == "ERM":
        return "black"
    return AMP if name.startswith(("AMP", "budget")) else OTHER


def _short(label: str) -> str:
    shorter = label.replace("average of the weights", "EMA")
    return shorter.replace("AMP(), elementwise", "elementwise")


def _write_names(axis: Axes, runs: Runs, key: str, found: dict[str, list[float]]) -> None:
    """Beside their points; those that would overlap are moved up."""
    to_axes = axis.transData + axis.transAxes.inverted()
    taken: dict[float, float] = {}
    for name in sorted(found, key=lambda name: statistics.mean(found[name])):
        passes, mean = runs.rows[name].passes, statistics.mean(found[name])
        x, y = to_axes.transform((passes, mean))
        lane = max(passes, 1.15)  # which the names at 1 reach into
        taken[lane] = y = max(y, taken.get(lane, 0.0) + APART)
        left = passes == 1.8 and any(runs.rows[other].passes == 2 for other in found)
        axis.annotate(
            _short(row_label(runs, key, name)),
            (passes, mean),
            (x - 0.02 if left else x + 0.02, y),
            textcoords="axes fraction",
            ha="right" if left else "left",
            va="center",
            fontsize=9,
            color=_color(name),
        )

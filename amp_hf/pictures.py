"""Pictures of a minimum and of a classifier's confidence, two or more models in each.

Every picture is a function that computes the numbers, which are plain and go into a JSON file, and
one that draws them:

    numbers = loss_curves({"ERM": LossSurface(erm, data), "AMP": LossSurface(amp, data)})
    save(draw_loss_curves(numbers), numbers, "curves.png")     # and curves.json

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart; the
styles of the lines differ as well, for print.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from .flatness import LossSurface, norm, worst_case_cost
from .metrics import calibration_bins

_LOSS = "training loss, nats"
_STYLES: list[dict[str, Any]] = [
    dict(color="#D55E00", linestyle="--", marker="s"),
    dict(color="#0072B2", linestyle="-", marker="o"),
    dict(color="#009E73", linestyle="-.", marker="^"),
    dict(color="#CC79A7", linestyle=":", marker="D"),
    dict(color="#000000", linestyle="-", marker="v"),
]


def loss_curves(
    surfaces: Mapping[str, LossSurface],
    radius: float = 0.1,
    scale: float = 0.3,
    points: int = 21,
    directions: int = 5,
    steps: int = 10,
) -> dict[str, Any]:
    """The loss along random directions, and along the worst one within `radius`.

    Args:
        surfaces: by the models' names, at most five.
        radius, steps: of `LossSurface.worst_case`. The curve goes twice as far as the radius.
        scale: how far the random directions are followed, in lengths of θ.
        points: of a curve.
        directions: of which the picture shows the mean and the range.

    Returns:
        `distances` and `worst_distances`, (points,); for each of `models` the losses `random`,
        (directions, points), and `worst`, (points,).
    """
    far = np.linspace(-scale, scale, points).round(6).tolist()
    near = np.linspace(-2 * radius, 2 * radius, points).round(6).tolist()
    numbers: dict[str, Any] = {"radius": radius, "distances": far, "worst_distances": near}
    numbers["models"] = {}
    for name, surface in surfaces.items():
        generator = surface.generator()
        cost = (directions + 1) * points + worst_case_cost(steps)
        with surface.announced(f"Loss curves of {name}", cost):
            random = [
                surface.along(surface.random_direction(generator), far) for _ in range(directions)
            ]
            _, delta = surface.worst_case(radius, steps)
            length = norm(delta) or 1.0
            worst = surface.along(delta, [distance / length for distance in near])
        numbers["models"][name] = {"random": random, "worst": worst}
    return numbers


def draw_loss_curves(numbers: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, model), style in zip(numbers["models"].items(), _STYLES):
        columns = list(zip(*model["random"]))
        line = style | dict(markevery=max(1, len(columns) // 10), markersize=5)
        x = numbers["distances"]
        left.plot(x, [statistics.mean(column) for column in columns], label=name, **line)
        low, high = list(map(min, columns)), list(map(max, columns))
        left.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        right.plot(numbers["worst_distances"], model["worst"], label=name, **line)
    count = len(model["random"])
    left.set_title(f"along {count} random directions (mean, range)")
    left.set_xlabel("distance, in lengths of the weights")
    right.set_title(f"along the worst direction within {numbers['radius']:g}")
    right.set_xlabel("distance, in parameter units")
    for axis in (left, right):
        axis.set_ylabel(_LOSS)
        _finish(axis)
    return figure


def loss_contours(
    surfaces: Mapping[str, LossSurface], scale: float = 0.5, points: int = 15
) -> dict[str, Any]:
    """The loss over the plane of two random directions, each in lengths of θ.

    Returns:
        `distances`, (points,); for each of `models` the losses, (points, points), with a row for
        each distance along the second direction.
    """
    distances = np.linspace(-scale, scale, points).round(6).tolist()
    numbers: dict[str, Any] = {"distances": distances, "models": {}}
    for name, surface in surfaces.items():
        generator = surface.generator()
        first, second = (surface.random_direction(generator) for _ in range(2))
        with surface.announced(f"Loss contours of {name}", points**2):
            numbers["models"][name] = surface.over(second, first, distances, distances)
    return numbers


def draw_loss_contours(numbers: dict[str, Any]) -> Figure:
    models = numbers["models"]
    figure = Figure(figsize=(4.3 * len(models) + 1, 4.2), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    # The same levels in all panels; evenly many points lie between two of them.
    values = np.array(list(models.values()))
    finite = values[np.isfinite(values)]
    levels = np.unique(np.quantile(finite if len(finite) else [0.0], np.linspace(0, 1, 13)))
    levels = levels if len(levels) > 1 else np.append(levels, levels + 1)
    colours = BoundaryNorm(levels, 256)
    for (name, losses), axis in zip(models.items(), axes):
        x = numbers["distances"]
        filled = axis.contourf(x, x, losses, levels, cmap="cividis", norm=colours)
        lines = axis.contour(x, x, losses, levels[1:-1], colors="white", linewidths=0.6)
        axis.clabel(lines, lines.levels[::2], fmt="%.2g", fontsize=7)
        axis.plot(0, 0, "w+")
        axis.set_title(name)
        axis.set_xlabel("first direction, in lengths of the weights")
        axis.set_aspect("equal")
    axes[0].set_ylabel("second direction, in lengths of the weights")
    figure.colorbar(filled, ax=axes, label=_LOSS, format="%.2g")
    return figure


def reliability(predictions: Mapping[str, tuple[Any, Any]], n_bins: int = 15) -> dict[str, Any]:
    """How often the models are right, by how sure they are: Guo et al., ICML 2017, figure 1.

    Args:
        predictions: by the models' names, logits (n, classes) and class indices (n,).
        n_bins: of equal width.

    Returns:
        For each of `models` the `share` of the samples in each bin, (n_bins,); the mean
        `confidence` and the `accuracy` of the bins that have any; and the calibration error, `ece`.
    """
    numbers: dict[str, Any] = {"models": {}}
    for name, (logits, labels) in predictions.items():
        count, confidence, correct = calibration_bins(logits, labels, n_bins)
        full = count > 0
        numbers["models"][name] = {
            "share": (count / count.sum()).tolist(),
            "confidence": (confidence[full] / count[full]).tolist(),
            "accuracy": (correct[full] / count[full]).tolist(),
            "ece": float(np.abs(correct - confidence).sum() / count.sum()),
        }
    return numbers


def draw_reliability(numbers: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="gray", linewidth=1, label="as sure as right")
    for (name, model), style in zip(numbers["models"].items(), _STYLES):
        label = f"{name}, calibration error {model['ece']:.3f}"
        upper.plot(model["confidence"], model["accuracy"], label=label, **style)
        edges = np.linspace(0, 1, len(model["share"]) + 1)
        line = {key: style[key] for key in ("color", "linestyle")}
        lower.stairs(model["share"], edges, linewidth=1.5, **line)
    upper.set_ylabel("accuracy")
    lower.set_ylabel("samples")
    lower.set_xlabel("confidence: probability of the predicted class")
    lower.set_yscale("log")
    for axis in (upper.xaxis, upper.yaxis, lower.yaxis):
        axis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    _finish(upper)
    lower.grid(alpha=0.3)
    return figure


def save(figure: Figure, numbers: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """A PNG at `path`, which ends in .png or gets it, and the numbers as JSON beside it."""
    path = Path(path)
    if path.suffix != ".png":
        path = path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    write_json(numbers, path.with_suffix(".json"))
    return path


def write_json(numbers: dict[str, Any], path: Path) -> None:
    """JSON has no NaN and no infinity: they become null."""
    plain = json.loads(json.dumps(numbers), parse_constant=lambda name: None)
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend()

"""Results in Markdown."""

import statistics
from collections.abc import Iterable

from runs import Runs

# Factor, and digits after the point.
_FORMATS = {
    "accuracy": (100, 2),
    "corrupted": (100, 1),
    "nll": (1, 3),
    "scaled_nll": (1, 3),
    "ece": (1, 3),
    "eigenvalue": (1, 1),
}


def mean_and_spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation; `sign` as in a format specification."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def lines_of(
    runs: Runs, key: str, names: Iterable[str], columns: Iterable[str], timed: bool = True
) -> list[str]:
    """A line for each row that has results: its name, its time, the columns and n."""
    lines = []
    for name in names:
        if runs.values(key, name, "accuracy"):
            times = [_time(runs, key, name)] if timed else []
            lines.append(
                line([row_label(runs, key, name), *times, *_cells(runs, key, name, columns)])
            )
    return lines


def row_label(runs: Runs, key: str, name: str) -> str:
    """The row's name, with its ε where the setting chose it."""
    chosen = runs.rows[name].chosen_epsilon
    return f"{name}, ε {runs.settings[key].epsilon:g}" if chosen else name


def _time(runs: Runs, key: str, name: str) -> str:
    ratio = runs.time_ratio(key, name)
    return f"{ratio:.2f}" if ratio else ""


def _cells(runs: Runs, key: str, name: str, columns: Iterable[str]) -> Iterable[str]:
    n = len(runs.values(key, name, "accuracy"))
    for column in columns:
        factor, digits = _FORMATS[column]
        values = [factor * value for value in runs.values(key, name, column)]
        text = mean_and_spread(values, digits).replace("-", "−") if values else ""
        yield f"{text} (n = {len(values)})" if 0 < len(values) < n else text
    yield str(n)

"""A progress bar that expects a perturbed step to take as long as its passes."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback

from ..config import AMPConfig
from ..radius import START
from ..trainer import AMPTrainer


class TimeLeftBar(tqdm):
    """Counts optimizer steps, and estimates the end by the passes that they take.

    Args:
        config: how steps are perturbed. Steps that the rule will leave plain count as perturbed.
        total: the steps of the whole training.
        initial: those taken before it was resumed.
    """

    def __init__(self, config: AMPConfig, total: int, initial: int = 0) -> None:
        start = max(config.ascent_start, START if config.epsilon is None else 0.0)
        self._first_ascent = start * total
        self._ascents = config.inner_steps * config.ascent_fraction / config.ascent_every
        if config.epsilon == 0:
            self._ascents = 0.0
        super().__init__(
            total=total,
            initial=initial,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{end}]",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        shown = super().format_dict
        done = self._passes(self.n) - self._passes(self.initial)
        if not done:
            return shown | {"left": "?", "end": ""}
        seconds = shown["elapsed"] / done * (self._passes(self.total) - self._passes(self.n))
        day = "%H:%M" if seconds < 12 * 3600 else "%a %H:%M"
        end = time.strftime(day, time.localtime(time.time() + seconds))
        return shown | {"left": self.format_interval(seconds), "end": f", ends {end}"}

    def _passes(self, steps: float) -> float:
        """Of the first `steps` steps, counted in forward and backward passes of a whole batch."""
        return steps + self._ascents * max(0.0, steps - self._first_ascent)


class TimeLeftCallback(ProgressCallback):
    """transformers' progress bars, of which the training's is a `TimeLeftBar`."""

    def __init__(self, trainer: AMPTrainer) -> None:
        super().__init__()
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            config = self._trainer.amp_config  # a search may have replaced it
            bar: Any = TimeLeftBar(config, state.max_steps, state.global_step)
            self.training_bar = bar
        self.current_step = state.global_step


def show_time_left(trainer: AMPTrainer) -> None:
    """In place of transformers' bar, where it shows one and not a notebook's table."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(TimeLeftCallback(trainer))

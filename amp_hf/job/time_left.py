"""A progress bar that expects a perturbed step to take as long as its passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import ProgressCallback

from ..config import AMPConfig
from ..progress import Progress
from ..radius import START
from ..trainer import AMPTrainer

_ENDLESS = 1e8  # seconds: `max_steps` may stand for a training that is to be stopped by hand


class TimeLeftBar(tqdm):
    """Counts optimizer steps, and estimates the end by the passes that they take.

    Args:
        config: how steps will be perturbed. Those that the rule will leave plain count as
            perturbed, so the training may end earlier.
        ascents: how many steps have had one so far.
        total: the steps of the whole training.
        initial: those taken before it was resumed.
    """

    def __init__(
        self, config: AMPConfig, ascents: Callable[[], int], total: int, initial: int = 0
    ) -> None:
        start = max(config.ascent_start, START if config.epsilon is None else 0.0)
        self._first_ascent = start * total
        self._share = 0.0 if config.epsilon == 0 else 1 / config.ascent_every
        self._cost = config.inner_steps * config.ascent_fraction  # of an ascent, in passes
        self._ascents = ascents
        self._ascents_before = ascents()
        super().__init__(
            total=total,
            initial=initial,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}, {rate_fmt}{end}]",
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        shown = super().format_dict
        # In forward and backward passes of a whole batch.
        done = self.n - self.initial + self._cost * (self._ascents() - self._ascents_before)
        ascents = self._share * (self.total - max(self.n, self._first_ascent))
        left = self.total - self.n + self._cost * max(0.0, ascents)
        seconds = shown["elapsed"] / done * left if done else math.inf
        if seconds > _ENDLESS:
            return shown | {"left": "?", "end": ""}
        day = "%H:%M" if seconds < 12 * 3600 else "%a %H:%M"
        end = time.strftime(day, time.localtime(time.time() + seconds))
        return shown | {"left": self.format_interval(seconds), "end": f", ends {end}"}


class TimeLeftCallback(ProgressCallback):
    """transformers' progress bars, of which the training's is a `TimeLeftBar`."""

    def __init__(self, trainer: AMPTrainer) -> None:
        super().__init__()
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            config = self._trainer.amp_config  # a search may have replaced it
            bar: Any = TimeLeftBar(config, self._ascents, state.max_steps, state.global_step)
            self.training_bar = bar
        self.current_step = state.global_step

    def _ascents(self) -> int:
        run, state = self._trainer._amp_step.run, self._trainer.state
        # The run begins with the first step, and then has what a checkpoint had.
        progress = run.progress if run.state is state else Progress.of(state)
        return progress.ascent_steps


def show_time_left(trainer: AMPTrainer) -> None:
    """In place of transformers' bar, where it shows one and not a notebook's table."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(TimeLeftCallback(trainer))

"""How long a Trainer's steps take, how much memory, and on what machine."""

import statistics
import time

import numpy as np
import torch
from transformers import TrainerCallback


def machine() -> dict[str, str | int]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),  # which decide how sums round
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class Clock(TrainerCallback):
    """Records when steps begin and end."""

    def __init__(self) -> None:
        self.marks: list[tuple] = []

    def on_train_begin(self, *args, **kwargs):
        self.marks = []

    def on_step_begin(self, *args, **kwargs):
        self._begin = _mark()

    def on_step_end(self, *args, **kwargs):
        self.marks.append((self._begin, _mark()))

    def milliseconds(self) -> tuple[float, float]:
        """In the last cycle: a mean step, and the mean from one step's end to the next one's."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        steps = [_between(begin, end) for begin, end in self.marks[1:]]  # the first is a warm-up
        cycle = _between(self.marks[0][1], self.marks[-1][1])
        return statistics.mean(steps), cycle / len(steps)


def _mark():
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin, end) -> float:
    return begin.elapsed_time(end) if torch.cuda.is_available() else (end - begin) * 1000


class PeakMemory(TrainerCallback):
    """Peak bytes of live tensors during the steps, beyond those at the first one's beginning."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                self._before = torch.cuda.memory_allocated()
            else:
                self._profiler = torch.profiler.profile(profile_memory=True)
                self._profiler.start()

    def on_train_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated() - self._before
        else:
            self._profiler.stop()
            changes = [
                (event.start_ns(), event.nbytes())
                for event in self._profiler.profiler.kineto_results.events()
                if event.name() == "[memory]"
            ]
            self.peak = int(np.cumsum([size for _, size in sorted(changes)]).max())

"""The bar of the recipes: when the training will end."""

import re

import pytest

from amp_hf import AMPConfig
from amp_hf.job.time_left import TimeLeftBar


class Clock:
    """A bar on which every pass takes a second."""

    def __init__(self, config: AMPConfig, **steps: int) -> None:
        self.bar = TimeLeftBar(config, **steps)
        self.bar._time = lambda: self.now
        self.now = self.bar.start_t

    def left(self, steps: int, seconds: float) -> str:
        self.now += seconds
        self.bar.n += steps
        return self.bar.format_dict["left"]


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (AMPConfig(epsilon=0), "01:20"),
        (AMPConfig(epsilon=0.1), "02:40"),
        (AMPConfig(), "02:40"),  # plain up to step 20, two passes from there on
        (AMPConfig(epsilon=0.1, inner_steps=2, ascent_start=0.5), "03:00"),
        (AMPConfig(epsilon=0.1, ascent_every=5, ascent_start=0.5), "01:30"),
    ],
)
def test_a_perturbed_step_counts_as_the_passes_that_it_takes(config, left):
    clock = Clock(config, total=100)
    perturbed_from_the_start = config.epsilon == 0.1 and config.ascent_start == 0
    assert clock.left(20, seconds=40 if perturbed_from_the_start else 20) == left


def test_steps_of_an_earlier_run_took_no_time_of_this_one():
    clock = Clock(AMPConfig(epsilon=0), total=100, initial=60)
    assert clock.bar.format_dict["left"] == "?"
    assert clock.left(10, seconds=50) == "02:30"
    assert re.search(r"70/100 \[00:50<02:30, .*, ends \d\d:\d\d\]$", str(clock.bar))

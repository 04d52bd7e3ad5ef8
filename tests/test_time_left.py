"""The bar of the recipes: when the training will end."""

import re
import sys

import pytest

from amp_hf import AMPConfig
from amp_hf.job.time_left import TimeLeftBar


class Clock:
    """A bar on which every pass takes a second."""

    def __init__(self, config: AMPConfig, **steps: int) -> None:
        self.ascents = 0
        self.bar = TimeLeftBar(config, lambda: self.ascents, **steps)
        self.bar._time = lambda: self.now
        self.now = self.bar.start_t

    def left(self, steps: int, ascents: int, seconds: float) -> str:
        self.now += seconds
        self.ascents += ascents
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
    ascents = 20 if config.epsilon == 0.1 and config.ascent_start == 0 else 0
    assert clock.left(20, ascents, seconds=20 + ascents) == left


def test_steps_that_the_rule_left_plain_count_as_they_were():
    clock = Clock(AMPConfig(), total=100)
    assert clock.left(60, ascents=0, seconds=60) == "01:20"  # if all others are perturbed
    assert clock.left(20, ascents=10, seconds=30) == "00:40"


def test_a_training_without_an_end_has_no_time_left():
    clock = Clock(AMPConfig(epsilon=0), total=sys.maxsize)
    assert clock.left(10, ascents=0, seconds=10) == "?"


def test_steps_of_an_earlier_run_took_no_time_of_this_one():
    clock = Clock(AMPConfig(epsilon=0), total=100, initial=60)
    assert clock.bar.format_dict["left"] == "?"
    assert clock.left(10, ascents=0, seconds=50) == "02:30"
    assert re.search(r"70/100 \[00:50<02:30, .*, ends \d\d:\d\d\]$", str(clock.bar))

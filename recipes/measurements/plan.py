"""What is run: settings, the rows of their tables, and the arguments that choose among them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from amp_hf import AMPTrainer
from amp_hf.images.classification import ImageJob
from amp_hf.job.job import Job

CIFAR10, GTSRB = "uoft-cs/cifar10", "tanganke/gtsrb"
DIGITS = "digits"  # those of train_digits.py
SECTIONS = "debian_sections"  # descriptions of Debian packages; not on the Hub
# Test splits of the Hub's copy of GTSRB; corrupted_gtsrb.py makes them for another copy.
CORRUPTIONS = (
    "contrast",
    "gaussian_noise",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "spatter",
)


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and for how long.

    Args:
        title: the data and the schedule, as tables name them.
        dataset: `CIFAR10`, `GTSRB`, `DIGITS` or `SECTIONS`.
        network: a model as its recipe takes it.
        argv: further arguments of the recipe.
        epsilon: the radius for rows with `chosen_epsilon`.
        base: the setting whose ERM model the training begins with, instead of from scratch.
        pretrained: begin with the network's own weights instead of from scratch.
        recipe: train as the dataset's recipe does by itself, but for what `argv` says.
        job: the class that trains it.
        curvature: measure the Hessian, in rows that ask for it.
        corrupted: test on `CORRUPTIONS`, too.
    """

    title: str
    dataset: str
    network: str
    argv: str
    epochs: int
    epsilon: float | None = None
    base: str | None = None
    pretrained: bool = False
    recipe: bool = False
    job: type[Job] = ImageJob
    curvature: bool = True
    corrupted: bool = False


@dataclass(frozen=True)
class Row:
    """How a model is trained and tested.

    Args:
        argv: further arguments of the recipe.
        epsilon: the radius; `None`: the recipe's default.
        budget: as `AMPConfig.for_budget` takes it.
        chosen_epsilon: the radius is the setting's, which held-out images chose.
        held_out: test on a fifth of the training set, held out, instead of on the test set.
        family: the rows that a plot shows alike.
        epochs: as a multiple of the setting's.
        curvature: measure the largest eigenvalue of the Hessian.
    """

    argv: str = ""
    epsilon: float | None = None
    budget: float | None = None
    chosen_epsilon: bool = False
    held_out: bool = False
    family: str | None = None
    epochs: float = 1.0
    trainer: type[AMPTrainer] = AMPTrainer
    curvature: bool = False

    @property
    def sets_itself(self) -> bool:
        return self.epsilon is None and not self.chosen_epsilon

    @property
    def passes(self) -> float:
        """Forward and backward passes of a training, as a multiple of ERM's."""
        if self.budget is not None:
            per_step = self.budget
        elif self.epsilon == 0:
            per_step = 1.0
        elif self.sets_itself:
            per_step = 1.8  # all but the first 20 %, where the data are learnt early
        else:
            per_step = 2.0
        return per_step * self.epochs

    def arguments(self, setting: Setting) -> str:
        """The row's part of the recipe's command line."""
        epsilon = setting.epsilon if self.chosen_epsilon else self.epsilon
        tracks = " --track_length 1" if setting.job is ImageJob else ""
        held_out = f"--validation_fraction 0.2{tracks}" if self.held_out else ""
        budget = "" if self.budget is None else f"--budget {self.budget:g}"
        radius = "" if epsilon is None else f"--epsilon {epsilon}"
        return f"{held_out} {self.argv} {budget} {radius}"


@dataclass
class RunArguments:
    settings: list[str] | None = field(
        default=None, metadata={"help": "Networks on data sets, by name. Default: all."}
    )
    rows: list[str] | None = field(
        default=None,
        metadata={"help": "Ways to train, by their names in the tables. Default: all."},
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "Of the trainings. Default: the tables' own."}
    )
    rounds: int = field(
        default=9, metadata={"help": "How often each row is timed, in short trainings; 0: not."}
    )
    print_only: bool = field(
        default=False, metadata={"help": "Run nothing: print and draw what the file holds."}
    )
    data: str | None = field(
        default=None,
        metadata={"help": "A folder of local copies, of data sets and models. Default: the Hub."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "All results, in JSON; plots lie beside it. Default: beside this file."},
    )

    def check_data(self, settings: Iterable[Setting]) -> None:
        for setting in settings:
            name = setting.dataset
            if self.settings and (lack := self.lack(setting)):
                raise ValueError(f"--settings: {lack}")
            if self.data and name not in (DIGITS, SECTIONS) and self.source(name) == name:
                raise ValueError(
                    f"--data {self.data} has no folder {_folder(name)!r}. Pass --data a folder of "
                    "local copies, or leave it out to take the data sets from the Hub."
                )

    def lack(self, setting: Setting) -> str:
        """What of the setting's data is out of reach, and what to do; empty if nothing is."""
        source = self.source(setting.dataset)
        if source == SECTIONS:
            return f"{SECTIONS} is not on the Hub. Pass --data a folder that holds it."
        local = source != setting.dataset
        if local and setting.corrupted and not any(Path(source).glob("data/contrast-*")):
            return (
                f"{source} has no corrupted test splits. Make a copy that has them with "
                "recipes/measurements/corrupted_gtsrb.py."
            )
        return ""

    def source(self, name: str) -> str:
        """Where the data set or the model is: in the folder of its local copy, or on the Hub."""
        local = os.path.join(self.data, _folder(name)) if self.data else ""
        return local if os.path.isdir(local) else name


def _folder(name: str) -> str:
    return name.rpartition("/")[2]


def check_names(option: str, chosen: Iterable[str], known: Iterable[str]) -> None:
    """Refuses a name that an option does not know."""
    for name in chosen:
        if name not in known:
            raise ValueError(f"--{option} knows {', '.join(known)}, not {name!r}.")

"""What the user chooses. Imports no torch, so that command lines start fast."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Ball = Literal["global", "tensor", "elementwise"]
Scope = Literal["micro_batch", "batch"]
NormStats = Literal["clean", "both"]

AMP_CONFIG_NAME = "amp_config.json"  # beside every model that is saved


@dataclass(frozen=True)
class AMPConfig:
    """How a model is perturbed: Algorithm 1 of Zheng et al., CVPR 2021 (arXiv 2010.04925).

    `AMPConfig()` sets its radius by itself (`amp_hf.radius`). In recipes/measurements/README.md,
    networks that train from scratch on few photographs gained 0.09 to 0.55 nats of the negative
    log-likelihood and up to 6.3 points of accuracy; small transformers lost up to 0.5 ± 0.7 points.
    With `epsilon=x` the radius is x, as published; search for the best one. Fine-tunings on few
    samples gained more with it.

    Every field is checked on construction; a bad one raises `ValueError` naming the field and what
    it accepts. `transformers.HfArgumentParser` can parse the dataclass, and it comes back from JSON
    equal to itself.
    """

    epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Radius of the ball, >= 0, in parameter units (elementwise: in none); 0 is the "
            "stock Trainer. By default it sets itself, so that the loss rises by about `rise`."
        },
    )
    rise: float = field(
        default=0.2,
        metadata={
            "help": "Where epsilon sets itself: how far the perturbation raises the loss, > 0, in "
            "nats, once the data are learnt; less before that, and less where the loss rises more "
            "than exponentially."
        },
    )
    inner_lr: float = field(
        default=1.0,
        metadata={
            "help": "Ascent step, > 0, in parameter units per unit of gradient. Where epsilon sets "
            "itself, every ascent ends on the sphere instead."
        },
    )
    inner_steps: int = field(
        default=1, metadata={"help": "Ascents per step, >= 1; each costs one forward and backward."}
    )
    ball: Ball = field(
        default="global",
        metadata={
            "help": "global: one ball over all parameters; tensor: a ball for each tensor, all of "
            "the same radius; elementwise: one ball, in which each weight's part counts relative "
            "to its size."
        },
    )
    scope: Scope | None = field(
        default=None,
        metadata={
            "help": "The batch a perturbation is computed on: micro_batch (each micro-batch and "
            "each device its own; the default where the engine allows it) or batch (one for the "
            "whole optimizer step)."
        },
    )
    ascent_start: float = field(
        default=0.0,
        metadata={"help": "Fraction of the training steps, in [0, 1), before the first ascent."},
    )
    ascent_every: int = field(
        default=1, metadata={"help": "Perturb on every k-th optimizer step, k >= 1."}
    )
    ascent_fraction: float = field(
        default=1.0, metadata={"help": "Share of the batch, in (0, 1], that the ascents see."}
    )
    perturb: str = field(
        default="all",
        metadata={
            "help": "all, norm (normalization layers only) or a regular expression that is "
            "searched for in parameter names."
        },
    )
    norm_stats: NormStats = field(
        default="clean",
        metadata={
            "help": "BatchNorm's running statistics: from the clean pass only, or from both."
        },
    )
    ascent_reuse: bool = field(
        default=False,
        metadata={
            "help": "Perturb the steps between two ascents, too, by the last perturbation; such "
            "steps make one pass, as plain ones do."
        },
    )

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            self._check_real("epsilon", "None or a finite number >= 0", lambda x: x >= 0)
        self._check_real("rise", "a finite number > 0", lambda x: x > 0)
        self._check_real("inner_lr", "a finite number > 0", lambda x: x > 0)
        self._check_real("ascent_start", "a number in [0, 1)", lambda x: 0 <= x < 1)
        self._check_real("ascent_fraction", "a number in (0, 1]", lambda x: 0 < x <= 1)
        self._check_count("inner_steps")
        self._check_count("ascent_every")
        self._check_choice("ball", get_args(Ball))
        self._check_choice("scope", (None, *get_args(Scope)))
        self._check_choice("norm_stats", get_args(NormStats))
        if not isinstance(self.ascent_reuse, bool):
            raise self._refuse("ascent_reuse", "True or False")
        self._check_perturb()

    @classmethod
    def for_budget(cls, budget: float) -> AMPConfig:
        """`AMPConfig()` with fewer ascents: `budget` times the stock Trainer's passes at most.

        An ascent costs one further pass. Every k-th step of the last part of the training has one,
        and the steps between reuse its Δ. That part is as near to 60 % of the training as a whole k
        allows when all of the budget is spent. It is shorter below 1.1, because a Δ that is reused
        for many more than six steps does harm. No more than 1.3 is spent: more gained nothing.
        recipes/measurements/README.md has the measurements, and says where this loses.

        Args:
            budget: > 1, rounded up to whole passes. Moving the parameters comes on top (measured
                there, too), and so does the ascent that follows a checkpoint.

        Raises:
            ValueError: any other budget.
        """
        passes = _as_float(budget)
        if not passes > 1:
            raise ValueError(
                "AMPConfig.for_budget takes a finite number > 1, times the stock Trainer's "
                f"passes, got {_shown(budget)}. AMPConfig(epsilon=0) is the stock Trainer."
            )
        spare = min(passes - 1, 0.3)
        every = min(round(0.6 / spare), 6)
        # Below 1 where next to nothing is to spare: the last step is then perturbed.
        start = min(round(1 - every * spare, 6), 0.999999)
        return cls(ascent_start=start, ascent_every=every, ascent_reuse=True)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Writes the file whole or not at all: one that is there stays as it was on an error."""
        partial = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        try:
            partial.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> AMPConfig:
        """The config that `to_json_file` wrote.

        Raises:
            ValueError: the file holds no JSON object, an unknown field or a bad value.
        """
        with open(path, encoding="utf-8") as file:
            try:
                saved = json.load(file)
            except (ValueError, RecursionError):
                saved = None
        if not isinstance(saved, dict):
            raise ValueError(f"{path} cannot be read as a JSON object.")
        if unknown := saved.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"{path} has fields that AMPConfig does not have: {sorted(unknown)}.")
        return cls(**saved)

    def changes_since(self, path: str | os.PathLike[str]) -> list[str]:
        """One sentence for each field that differs from the config in the JSON file at `path`."""
        try:
            saved = self.from_json_file(path).to_dict()
        except ValueError as error:
            return [str(error).removesuffix(".")]
        return [
            f"{name} was {saved[name]!r} and is {value!r}"
            for name, value in self.to_dict().items()
            if saved[name] != value
        ]

    def perturbs_at(self, step: int, max_steps: int) -> bool:
        """Whether optimizer step `step` (from 0) of `max_steps` is perturbed.

        The first ⌊ascent_start · max_steps⌋ steps are plain, so at least one is perturbed. From
        there on, every `ascent_every`-th step is, and with `ascent_reuse` those between, too, by an
        earlier Δ. Where `epsilon` sets itself, the rule leaves more steps plain than that.
        """
        # Rounded first: 0.29 * 100 is 28.999999999999996.
        start = min(math.floor(round(self.ascent_start * max_steps, 6)), max_steps - 1)
        is_due = self.ascent_reuse or (step - start) % self.ascent_every == 0
        return self.epsilon != 0 and step >= start and is_due

    def _refuse(self, name: str, allowed: str) -> ValueError:
        return ValueError(f"AMPConfig.{name} must be {allowed}, got {_shown(getattr(self, name))}.")

    def _check_real(self, name: str, allowed: str, holds: Any) -> None:
        value = _as_float(getattr(self, name))
        if not holds(value):
            raise self._refuse(name, allowed)
        object.__setattr__(self, name, value)

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise self._refuse(name, "an integer >= 1")
        object.__setattr__(self, name, int(value))

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if not isinstance(value, str | None) or value not in choices:
            raise self._refuse(name, "one of " + ", ".join(map(repr, choices)))

    def _check_perturb(self) -> None:
        allowed = "'all', 'norm' or a regular expression on parameter names"
        if not isinstance(self.perturb, str) or not self.perturb:
            raise self._refuse("perturb", allowed)
        try:
            re.compile(self.perturb)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{self._refuse('perturb', allowed)} ({error})") from None


def _as_float(value: Any) -> float:
    """NaN, of which no comparison holds, unless `value` is a number and finite as a float."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except (ValueError, RecursionError):  # more than 4,300 digits, or nested too deeply
        return f"a {type(value).__name__} that is too large to show"

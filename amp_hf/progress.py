"""What a run keeps in the Trainer's state, and so in every checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState

_NAME = "amp_hf"  # in `TrainerState.stateful_callbacks`, of which the Trainer takes what it knows


def kept(state: TrainerState) -> dict[str, Any]:
    """What `keep` put there, in this run or in the one that it goes on from."""
    everything: Any = state.stateful_callbacks
    return everything.get(_NAME, {})


def keep(state: TrainerState, **values: Any) -> None:
    everything: Any = state.stateful_callbacks
    everything[_NAME] = copy.deepcopy(kept(state) | values)


@dataclass
class Progress:
    """How many steps were perturbed, also before the run was resumed.

    Attributes:
        ascent_steps: those that computed a perturbation.
        perturbed_steps: those that computed a perturbation or reused one.
        first: the first of them, from 0; `None` where there is none yet.
    """

    ascent_steps: int = 0
    perturbed_steps: int = 0
    first: int | None = None

    @classmethod
    def of(cls, state: TrainerState) -> Progress:
        """As it was when the training ended, or at the checkpoint that `state` is from."""
        return cls(**kept(state).get("progress", {}))

    def count(self, step: int, ascends: bool) -> None:
        self.ascent_steps += ascends
        self.perturbed_steps += 1
        self.first = step if self.first is None else self.first

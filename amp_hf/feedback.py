"""What the steps measure, on its way from the devices to the rule that sets ε."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .radius import Radius


class _Measured:
    """A step's target and measurements, on their way to the CPU while the device computes on."""

    def __init__(self, target: float, values: Tensor) -> None:
        self._target = target
        self._values = values.to("cpu", non_blocking=True)
        self._arrived: Any = None
        if values.device.type != "cpu":
            self._arrived = torch.Event(values.device)
            self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return [self._target, *self._values.tolist()]


class Feedback:
    """Tells `radius` of every step, once the next one is over: then no device is waited for.

    All ranks measure together and so keep the same radius. `state` is all that there is to know: a
    run that goes on from it ends where the uninterrupted one does.

    Attributes:
        target: how far the present step's Δ is to raise the loss; the step is plain where it is 0.
    """

    def __init__(self, accelerator: Accelerator, state: dict[str, Any] | None = None) -> None:
        self._accelerator = accelerator
        self.radius = Radius(**state["radius"]) if state else Radius()
        past = state["past"] if state else []  # of the last steps, the oldest first
        self._past = deque(
            _Measured(target, torch.tensor(rest, dtype=torch.float64)) for target, *rest in past
        )
        self._before = len(self._past)  # of them, those measured before the present step
        self.target = 0.0

    def next_step(self, rise: float, epochs: int, progress: float) -> None:
        """Sets the target of the step that begins; see `Radius.target` for the arguments."""
        while len(self._past) > 1:
            target, loss, perturbed_loss, linear_rise = self._past.popleft().read()
            self.radius.observe(loss, progress)
            # Where the batch was bad or Δ not finite, and so zero, nothing is learnt about Δ.
            if math.isfinite(loss) and linear_rise > 0:
                self.radius.steer(target, loss, perturbed_loss - loss, linear_rise)
        self._before = len(self._past)
        self.target = self.radius.target(rise, epochs, progress)

    def add(self, measured: Tensor) -> None:
        """The present step is over, on all ranks together.

        Args:
            measured: on this rank, the losses at θ and at θ + Δ, and what their difference would
                be, were the loss linear. A plain step passes its one loss twice, and 0.
        """
        means = self._accelerator.reduce(measured, reduction="mean")
        self._past.append(_Measured(self.target, means))

    def state(self) -> dict[str, Any]:
        """For a checkpoint after the present step, as JSON has it."""
        past = [measured.read() for measured in self._past]
        return {"radius": dict(vars(self.radius)), "past": past}

    def state_before(self) -> dict[str, Any]:
        """For a checkpoint in the middle of the present step, which will be taken again."""
        state = self.state()
        return state | {"past": state["past"][: self._before]}

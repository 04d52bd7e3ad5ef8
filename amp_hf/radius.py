"""The rule that sets ε where the user does not: it holds what Δ costs, not how long Δ is.

The ε that serves one network best lies a factor of twenty from that of another, but both raise the
loss by about as much. So the rise is held at a target, and ε is what it takes:

    learnt  = 1 − loss / first loss                     loss: a moving average, at θ
    target  = rise · learnt^min(20, (40 / epochs)^4) / (1 + 10 · bend)
    ε       ← ε · (target / (loss(θ + Δ) − loss(θ)))^0.2

A network first learns what its data have in common, and a perturbation is in the way of that. So
steps are plain until the loss has fallen by two thirds, and for the first 20 % in any case. In 40
epochs or more, the samples are likely to be memorized, and the target grows with what has been
learnt. In 18 or fewer they may never be; the exponent is then 20, so that steps are perturbed only
once nearly everything has been learnt: before that, a perturbation just slows the training down. A
step whose target is next to nothing is plain, too.

`bend` is how much more than an exponential the loss rises along Δ: near 0 for the convolutional
networks that it was found with, 0.3 for small transformers on few images, for which 0.1 nats are
too much. A loss that cannot fall to 0 (label smoothing, MixUp, a penalty) bends more than it would
without what keeps it up, so it is perturbed less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

START = 0.2  # share of the training before the first ascent
_LEARNT = 2 / 3  # of the first loss, which is gone before the first ascent
_EPOCHS = 40  # of a run whose target is in proportion to what has been learnt
_STEEPEST = 20.0  # exponent of what has been learnt, in shorter ones
_LEAST = 0.05  # share of the rise, below which a step is plain
_MEMORY = 0.95  # of the moving average, per step
_GAIN = 0.2  # exponent of the correction in a step
# The factors of its target between which a rise counts in full. Too long a Δ does harm at once.
_LOWEST, _HIGHEST = 1 / 4, 16.0
_CAUTION = 10.0  # how much less is aimed at where the loss bends
_OUTLIER = 1.25  # times the first loss: an average above it takes its place, early on
_SHARE = 1 / 10  # of the first loss, which the target never exceeds: it may not be in nats


@dataclass
class Radius:
    """What the rule remembers. All numbers are finite, or `None` where nothing is known yet.

    Attributes:
        epsilon: the radius of the next Δ, in parameter units (elementwise: in none).
        first_loss: the loss that the training began with: that of the first step, unless the
            average rises well above it early, as where a batch of few samples made it an outlier.
        loss: the moving average of the loss at θ.
        bend: the moving average of how much log loss rises along Δ beyond the first order, as a
            share of the first order. It has no unit.
    """

    epsilon: float | None = None
    first_loss: float | None = None
    loss: float | None = None
    bend: float = 0.0

    def target(self, rise: float, epochs: int, progress: float) -> float:
        """How far the next Δ is to raise the loss, >= 0; a step is plain where this is 0.

        Args:
            rise: in the unit of the loss, where everything has been learnt.
            epochs: how often the training sees its data, from its first step to its last.
            progress: the share of its steps that it has taken.
        """
        if progress < START or self.first_loss is None or self.loss is None:
            return 0.0
        if self.first_loss <= 0:
            return 0.0
        learnt = min(1.0, max(0.0, 1 - self.loss / self.first_loss))
        share = learnt ** min(_STEEPEST, (_EPOCHS / epochs) ** 4)
        if learnt < _LEARNT or share < _LEAST:
            return 0.0
        return share * min(rise, _SHARE * self.first_loss) / (1 + _CAUTION * max(0.0, self.bend))

    def begin(self, target: float, loss: float, slope: float) -> None:
        """The first radius: the one that raises `loss` by `target`, if it grows exponentially.

        So does that of a network that has learnt its data, where a guess of first order may be a
        hundred times too long.

        Args:
            slope: how far a Δ of radius 1 would raise the loss, were it linear. Where it is 0, or
                anything is not finite, there is no radius yet.
        """
        if not (math.isfinite(loss) and math.isfinite(slope) and slope > 0):
            return
        linear = loss * math.log1p(target / loss) if loss > 0 else target
        if math.isfinite(linear / slope):
            self.epsilon = linear / slope

    def observe(self, loss: float, progress: float) -> None:
        """A step's loss at θ; one that is not finite says nothing.

        Args:
            progress: as `target` takes it.
        """
        if not math.isfinite(loss):
            return
        if self.first_loss is None or self.loss is None:
            self.first_loss = self.loss = loss
        self.loss = _MEMORY * self.loss + (1 - _MEMORY) * loss
        if progress < START and 0 < _OUTLIER * self.first_loss < self.loss:
            self.first_loss = self.loss

    def steer(self, target: float, loss: float, rise: float, linear: float) -> None:
        """Corrects the radius by what the last Δ did.

        Args:
            target: that of its step, > 0.
            loss: at θ, finite.
            rise: loss(θ + Δ) − loss(θ). Where it is not finite, Δ was far too long.
            linear: what the rise would have been, were the loss linear; > 0.
        """
        if self.epsilon is None:
            return
        missed = rise / target if math.isfinite(rise) else _HIGHEST
        self.epsilon *= min(_HIGHEST, max(_LOWEST, missed)) ** -_GAIN
        if math.isfinite(rise) and min(loss, loss + rise) > 0:
            bend = loss * math.log1p(rise / loss) / linear - 1
            self.bend = _MEMORY * self.bend + (1 - _MEMORY) * min(1.0, max(-1.0, bend))

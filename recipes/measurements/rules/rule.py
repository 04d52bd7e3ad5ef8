"""A rule: how long Δ is, and in which geometry; and the radius that it steers from step to step."""

import dataclasses
import math
import statistics

import torch


@dataclasses.dataclass(frozen=True)
class Rule:
    """Δ = s·T²g, with ‖T⁻¹Δ‖ the radius ρ.

    Args:
        geometry: T is 1 (`ball`) or |θ| + c (`element`).
        control: `epsilon`: ρ = min(value, ‖Tg‖), the paper's. `first`: ρ = target/‖Tg‖. `steer`: ρ
            is multiplied by (target/rise)^gain after each ascent. `correct`: ρ = k·target/‖Tg‖, and
            k is steered.
        value: ε, or the target in nats before its gate.
        gate: what the target is multiplied by, with u = 1 − (EMA of the clean loss)/L0. `share`:
            u^p. `repeat`: u^(p/epochs so far). `horizon`: u^((p/epochs in all)^power).
        l0: `classes`: log C; `first`: the mean of the first steps' losses.
    """

    geometry: str = "ball"
    c: float = 0.01
    control: str = "steer"
    value: float = 0.1
    gain: float = 0.2
    gate: str = "none"
    p: float = 2.0
    power: float = 1.0  # of the exponent of `horizon`
    l0: str = "classes"
    beta: float = 0.95
    start: float = 0.0
    every: int = 1
    relative: float = 0.0  # if > 0, the target is multiplied by loss/(loss + relative)
    cap: float = 0.0  # if > 0, the share of the rise that curvature may add to ρ·‖Tg‖
    bend: float = 0.0  # if > 0, the same of the rise of log loss over ρ·‖Tg‖/loss
    soften: float = 0.0  # the target is divided by 1 + soften · (moving average of that excess)
    least: float = 0.0  # a step whose gate is below this is plain

    @classmethod
    def parse(cls, text: str) -> "Rule":
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        pairs = dict(word.split("=") for word in text.split())
        return cls(**{key: kinds[key](value) for key, value in pairs.items()})

    def __str__(self) -> str:
        if self == ERM:
            return "erm"
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return " ".join(changed) or "value=0.1"


ERM = Rule(control="epsilon", value=0.0)


class Radius:
    """The state of a rule, and the step's target and radius."""

    def __init__(self, rule: Rule, classes: int) -> None:
        self.rule = rule
        self.l0 = math.log(classes) if rule.l0 == "classes" else None
        self.first: list[float] = []
        self.ema: float | None = None
        self.excess = 0.0
        self.log_state: float | None = None  # log ρ under `steer`, log k under `correct`

    def see(self, loss: float) -> None:
        if self.rule.l0 == "first" and len(self.first) < 5:
            self.first.append(loss)
            self.l0 = statistics.mean(self.first)
        beta = self.rule.beta
        self.ema = loss if self.ema is None else beta * self.ema + (1 - beta) * loss

    def gate(self, epoch: float, epochs: int) -> float:
        """Known before the step."""
        if self.rule.gate == "none":
            return 1.0
        if self.ema is None or self.l0 is None:
            return 0.0
        learnt = min(1.0, max(0.0, 1 - self.ema / self.l0))
        per = {"share": 1.0, "repeat": max(epoch, 1e-9), "horizon": epochs}[self.rule.gate]
        return learnt ** ((self.rule.p / per) ** self.rule.power)

    def radius(self, target: float, norm: float) -> float:
        rule = self.rule
        if norm == 0 or target <= 0:
            return 0.0
        if rule.control == "epsilon":
            return min(target, norm)
        guess = target / norm
        if rule.control == "first":
            return guess
        if rule.control == "steer":
            if self.log_state is None:
                self.log_state = math.log(guess)
            return math.exp(self.log_state)
        if self.log_state is None:
            self.log_state = 0.0
        return guess * math.exp(self.log_state)

    def learn(self, target: float, rise: float, linear: float, loss: float) -> None:
        """`linear` is the rise of first order, ρ·‖Tg‖."""
        if min(linear, loss, loss + rise) > 0 and math.isfinite(rise):
            excess = math.log1p(rise / loss) / (linear / loss) - 1
            self.excess += (1 - self.rule.beta) * (min(1.0, max(-1.0, excess)) - self.excess)
        if self.rule.control in ("steer", "correct") and self.log_state is not None and target > 0:
            ratio = target / max(rise, target / 4) if math.isfinite(rise) else 0.25
            if self.rule.cap > 0 and linear > 0:
                ratio = min(ratio, self.rule.cap / max(rise / linear - 1, self.rule.cap / 4))
            if self.rule.bend > 0 and min(linear, loss, loss + rise) > 0:
                excess = math.log1p(rise / loss) / (linear / loss) - 1
                ratio = min(ratio, self.rule.bend / max(excess, self.rule.bend / 4))
            self.log_state += self.rule.gain * math.log(max(ratio, 0.25))


def scaled(rule: Rule, params: list[torch.Tensor], grads: list[torch.Tensor]):
    """T²g, and ‖Tg‖."""
    if rule.geometry == "ball":
        return grads, norm_of(grads)
    lengths = torch._foreach_abs(params)
    once = [g * (t + rule.c) for g, t in zip(grads, lengths)]
    norm = norm_of(once)
    return [g * (t + rule.c) for g, t in zip(once, lengths)], norm


def norm_of(tensors) -> float:
    return float(torch.stack(torch._foreach_norm(tensors)).norm())


def dot(a, b) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b)))

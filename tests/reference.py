"""Algorithm 1 of the AMP paper (CVPR 2021) as plainly as it can be written, in float64.

Knows no Trainer, no in-place arithmetic and no foreach: the package is compared with this.
"""

import math

import torch


def norm(tensors):
    return torch.sqrt(sum((t**2).sum() for t in tensors))


def shrink_to(tensors, radius):
    size = norm(tensors)
    return [t * (radius / size) for t in tensors] if size > radius else list(tensors)


def project(delta, epsilon, ball):
    if ball == "tensor":
        return [shrink_to([d], epsilon)[0] for d in delta]
    return shrink_to(delta, epsilon)


def units(theta, ball):
    """What Δ is measured in: those of ASAM, or the parameters' own."""
    return [t.abs() + 0.01 if ball == "elementwise" else torch.ones_like(t) for t in theta]


def gradient(loss, theta):
    theta = [t.detach().requires_grad_() for t in theta]
    return list(torch.autograd.grad(loss(theta), theta))


def perturbation(loss, theta, epsilon, inner_lr=1.0, inner_steps=1, ball="global"):
    """Δ for the batch whose mean loss at parameters θ is `loss(θ)`."""
    unit = units(theta, ball)
    delta = [torch.zeros_like(t) for t in theta]  # in these units
    for _ in range(inner_steps):
        ascent = gradient(loss, [t + u * d for t, u, d in zip(theta, unit, delta)])
        delta = [d + inner_lr * u * g for d, u, g in zip(delta, unit, ascent)]
        delta = project(delta, epsilon, ball)
    return [u * d for u, d in zip(unit, delta)]


def amp_gradient(loss, theta, **config):
    delta = perturbation(loss, theta, **config)
    return gradient(loss, [t + d for t, d in zip(theta, delta)])


def sgd(theta, grads, lr):
    return [t - lr * g for t, g in zip(theta, grads)]


class Rule:
    """Sets ε, of a training of so many steps and epochs. It hears of a step two steps later."""

    def __init__(self, rise, steps, epochs, first_loss, loss, bend):
        self.rise, self.steps, self.epochs = rise, steps, epochs
        self.first_loss, self.loss = first_loss, loss
        self.epsilon, self.bend = None, bend
        # Of each step: the target, the loss at θ, the one at θ + Δ, and its rise of first order.
        self.seen = []

    def target(self, step):
        if step >= 2:
            target, loss, perturbed, linear = self.seen[step - 2]
            self.loss = 0.95 * self.loss + 0.05 * loss
            if target > 0:
                missed = (perturbed - loss) / target
                self.epsilon /= min(16.0, max(0.25, missed)) ** 0.2
                bend = math.log(perturbed / loss) / (linear / loss) - 1
                self.bend = 0.95 * self.bend + 0.05 * min(1.0, max(-1.0, bend))
        learnt = 1 - self.loss / self.first_loss
        share = learnt ** min(20, (40 / self.epochs) ** 4)
        if step < 0.2 * self.steps or learnt < 2 / 3 or share < 0.05:
            return 0.0
        return share * min(self.rise, self.first_loss / 10) / (1 + 10 * max(0.0, self.bend))

"""Algorithm 1 of the AMP paper (CVPR 2021) as plainly as it can be written, in float64.

Knows no Trainer, no in-place arithmetic and no foreach: the package is compared with this.
"""

import torch


def norm(tensors):
    return torch.sqrt(sum((t**2).sum() for t in tensors))


def shrink_to(tensors, radius):
    size = norm(tensors)
    return [t * (radius / size) for t in tensors] if size > radius else list(tensors)


def project(delta, theta, epsilon, ball):
    if ball == "global":
        return shrink_to(delta, epsilon)
    if ball == "tensor":
        return [shrink_to([d], epsilon)[0] for d in delta]
    return [shrink_to([d], epsilon * norm([t]))[0] for d, t in zip(delta, theta)]


def gradient(loss, theta):
    theta = [t.detach().requires_grad_() for t in theta]
    return list(torch.autograd.grad(loss(theta), theta))


def perturbation(
    loss, theta, epsilon, inner_lr=1.0, inner_steps=1, ball="global", ascent_below=None
):
    """Δ for the batch whose mean loss at parameters θ is `loss(θ)`."""
    if ascent_below is not None:
        epsilon = epsilon * max(0.0, 1 - float(loss(theta)) / ascent_below)
    delta = [torch.zeros_like(t) for t in theta]
    for _ in range(inner_steps):
        ascent = gradient(loss, [t + d for t, d in zip(theta, delta)])
        delta = [d + inner_lr * g for d, g in zip(delta, ascent)]
        delta = project(delta, theta, epsilon, ball)
    return delta


def amp_gradient(loss, theta, **config):
    delta = perturbation(loss, theta, **config)
    return gradient(loss, [t + d for t, d in zip(theta, delta)])


def sgd(theta, grads, lr):
    return [t - lr * g for t, g in zip(theta, grads)]

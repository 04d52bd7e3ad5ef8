"""What the reference makes of the batches that a training saw."""

import reference
import torch
import torch.nn.functional as F


def mean_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def mlp_loss(batch):
    def loss(theta):
        w1, b1, w2, b2 = theta
        hidden = torch.tanh(batch["pixels"].flatten(1) @ w1.T + b1)
        return F.cross_entropy(hidden @ w2.T + b2, batch["labels"])

    return loss


def mean(losses):
    """The loss of a whole window of micro-batches."""
    return lambda theta: sum(loss(theta) for loss in losses) / len(losses)


def amp_gradient(loss, theta, seen=None, chosen=None, **config):
    """The gradient of `loss` at θ + Δ, with Δ from the loss `seen` on the `chosen` of θ."""
    chosen = range(len(theta)) if chosen is None else chosen

    def moved(values):
        theta_moved = list(theta)
        for i, value in zip(chosen, values):
            theta_moved[i] = value
        return theta_moved

    part = [theta[i] for i in chosen]
    delta = reference.perturbation(lambda p: (seen or loss)(moved(p)), part, **config)
    return reference.gradient(loss, moved([p + d for p, d in zip(part, delta)]))


def average(gradients):
    return [sum(parts) / len(parts) for parts in zip(*gradients)]


def assert_at(model, theta, atol=1e-10):
    params = [p.detach() for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(params, theta, rtol=0, atol=atol)

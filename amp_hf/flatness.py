"""How flat is this minimum."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .perturbation import Perturbation


def sharpness(
    model: nn.Module, inputs: dict[str, Any], epsilon: float, inner_steps: int = 5
) -> float:
    """The rise of the mean loss over `inputs` at the worst point found within `epsilon` of θ.

    The inner maximization of Algorithm 1 (Zheng et al., CVPR 2021), Δ ← project(Δ + ζ·∇L), with
    ascents as long as the ball's radius: ζ = ε / ‖∇L‖₂. In evaluation mode, so that running
    statistics are used and not changed; the parameters end as they were.

    Args:
        inputs: what `model(**inputs)["loss"]` takes, on the model's device.
        epsilon: radius, > 0, in parameter units, over all trainable parameters together.

    Returns:
        max over the ascents of L(θ + Δ) − L(θ), in the unit of the loss.
    """
    was_training = model.training
    params = [param for param in model.parameters() if param.requires_grad]
    perturbation = Perturbation(params, epsilon, "global")
    model.eval()
    try:
        losses = []
        for _ in range(inner_steps):
            loss = model(**inputs)["loss"]
            losses.append(loss.detach())
            gradient = list(torch.autograd.grad(loss, params, materialize_grads=True))
            perturbation.ascend(gradient, epsilon / torch.nn.utils.get_total_norm(gradient))
        with torch.no_grad():
            losses.append(model(**inputs)["loss"])
    finally:
        perturbation.restore()
        model.train(was_training)
    clean, *displaced = torch.stack(losses).tolist()
    return max(displaced) - clean

"""Cheaper perturbations that did not pay; frontier.py measures them and README.md discusses them.

For one process, without gradient accumulation.
"""

import torch
from torch import Tensor
from transformers import Trainer

from amp_hf import AMPTrainer
from amp_hf.blocks import JointTensors
from amp_hf.perturbation import Perturbation
from amp_hf.preserve import norm_buffers, preserved_buffers, preserved_rng

ONTO_THE_BALL = 1e6  # a rate at which any direction reaches the ball


class BF16Ascents(AMPTrainer):
    """Ascents in bf16; the rest of the step keeps its precision."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        inner_passes = self._amp_step._inner_passes

        def in_bf16(*args) -> list[Tensor]:
            with torch.autocast(self.args.device.type, torch.bfloat16):
                return inner_passes(*args)

        self._amp_step._inner_passes = in_bf16


class FreeAscent(AMPTrainer):
    """Perturbs in a direction that is already known, which saves the pass."""

    def direction(self, params: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def training_step(self, model, inputs, num_items_in_batch=None):
        params = list(self.model.parameters())
        perturbation = Perturbation(params, self.amp_config.epsilon, "global")
        if self.state.global_step:
            perturbation.ascend(JointTensors.copy_of(self.direction(params)), ONTO_THE_BALL)
        try:
            return Trainer.training_step(self, model, inputs, num_items_in_batch)
        finally:
            perturbation.restore()


class MomentumAscent(FreeAscent):
    """The optimizer's momentum as the direction (MSAM, Becker et al., arXiv 2401.12033)."""

    def direction(self, params: list[Tensor]) -> list[Tensor]:
        return [self.optimizer.state[param]["momentum_buffer"].clone() for param in params]


class PreviousGradient(FreeAscent):
    """The previous step's gradient as the direction."""

    def direction(self, params: list[Tensor]) -> list[Tensor]:
        return self.previous

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.previous = [param.grad.clone() for param in self.model.parameters()]
        return loss


class LookSAM(AMPTrainer):
    """Every k-th step computes the part of SAM's gradient that is orthogonal to the plain gradient;
    the steps between add it to theirs (Liu et al., CVPR 2022, arXiv 2203.02714)."""

    k = 5
    alpha = 0.7

    def training_step(self, model, inputs, num_items_in_batch=None):
        params = list(self.model.parameters())

        def step() -> tuple[Tensor, list[Tensor]]:
            loss = Trainer.training_step(self, model, inputs, num_items_in_batch)
            return loss, [param.grad for param in params]

        if self.state.global_step % self.k:
            loss, gradient = step()
            scale = self.alpha * _norm(gradient) / _norm(self.orthogonal)
            torch._foreach_add_(gradient, torch._foreach_mul(self.orthogonal, scale))
            return loss
        with preserved_rng(self.args.device):
            loss, plain = step()
        model.zero_grad()
        perturbation = Perturbation(params, self.amp_config.epsilon, "global")
        perturbation.ascend(JointTensors.copy_of(plain), ONTO_THE_BALL)
        try:
            with preserved_buffers(norm_buffers(model)):
                gradient = step()[1]
        finally:
            perturbation.restore()
        along = sum((a * b).sum() for a, b in zip(gradient, plain)) / _norm(plain) ** 2
        self.orthogonal = torch._foreach_sub(gradient, torch._foreach_mul(plain, along))
        return loss


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)

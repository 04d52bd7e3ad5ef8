"""What AMP is compared with, and README.md discusses: cheaper perturbations, which did not pay, for
frontier.py, and what else a user might regularize with, for erm_comparison.py.

For one process, without gradient accumulation.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2 import MixUp
from transformers import Trainer, TrainerCallback

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


class TwoPasses(AMPTrainer):
    """A pass at θ, which shows where to go, and one there."""

    def displace(self, gradient: list[Tensor]) -> Perturbation:
        """Takes the parameters to θ + Δ, by the gradient at θ; returns the way back."""
        raise NotImplementedError

    def one_pass(self, model, inputs, num_items_in_batch) -> tuple[Tensor, list[Tensor]]:
        loss = Trainer.training_step(self, model, inputs, num_items_in_batch)
        return loss, [param.grad for param in model.parameters()]

    def two_passes(
        self, model, inputs, num_items_in_batch
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The loss at θ, the gradient there, and the gradient at θ + Δ."""
        with preserved_rng(self.args.device):
            loss, plain = self.one_pass(model, inputs, num_items_in_batch)
        model.zero_grad()
        perturbation = self.displace(plain)
        try:
            with preserved_buffers(norm_buffers(model)):
                _, perturbed = self.one_pass(model, inputs, num_items_in_batch)
        finally:
            perturbation.restore()
        return loss, plain, perturbed


class LookSAM(TwoPasses):
    """Every k-th step computes the part of SAM's gradient that is orthogonal to the plain gradient;
    the steps between add it to theirs (Liu et al., CVPR 2022, arXiv 2203.02714)."""

    k = 5
    alpha = 0.7

    def displace(self, gradient: list[Tensor]) -> Perturbation:
        perturbation = Perturbation(
            list(self.model.parameters()), self.amp_config.epsilon, "global"
        )
        perturbation.ascend(JointTensors.copy_of(gradient), ONTO_THE_BALL)
        return perturbation

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step % self.k:
            loss, gradient = self.one_pass(model, inputs, num_items_in_batch)
            scale = self.alpha * _norm(gradient) / _norm(self.orthogonal)
            torch._foreach_add_(gradient, torch._foreach_mul(self.orthogonal, scale))
            return loss
        loss, plain, perturbed = self.two_passes(model, inputs, num_items_in_batch)
        along = sum((a * b).sum() for a, b in zip(perturbed, plain)) / _norm(plain) ** 2
        self.orthogonal = torch._foreach_sub(perturbed, torch._foreach_mul(plain, along))
        return loss


class ASAM(TwoPasses):
    """SAM in the units of each weight (Kwon et al., ICML 2021, arXiv 2102.11600); ρ is `epsilon`.

    As in the authors' code, Δ = ρ T²g / ‖Tg‖, where T is |θ| + η for weights and 1 for biases.
    """

    eta = 0.01

    @torch.no_grad()
    def displace(self, gradient: list[Tensor]) -> Perturbation:
        named = dict(self.model.named_parameters())
        units = [
            param.abs() + self.eta if "weight" in name else torch.ones_like(param)
            for name, param in named.items()
        ]
        ascent = JointTensors.copy_of(gradient)
        torch._foreach_mul_(ascent.tensors, units)
        length = _norm(ascent.tensors)
        torch._foreach_mul_(ascent.tensors, units)
        perturbation = Perturbation(list(named.values()), math.inf, "global")
        perturbation.ascend(ascent, self.amp_config.epsilon / length)
        return perturbation

    def training_step(self, model, inputs, num_items_in_batch=None):
        return self.two_passes(model, inputs, num_items_in_batch)[0]


class MixedUp(AMPTrainer):
    """Trains on mixtures of two images each (MixUp, Zhang et al., ICLR 2018, arXiv 1710.09412)."""

    alpha = 1.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mix = MixUp(alpha=self.alpha, num_classes=self.model.num_labels)
        images, targets = mix(inputs["pixel_values"], inputs["labels"])
        return F.cross_entropy(model(pixel_values=images).logits, targets)


class Averaged(AMPTrainer):
    """Ends at the exponential moving average of the weights and of BatchNorm's statistics."""

    decay = 0.99  # per step

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Average(self.decay))


class _Average(TrainerCallback):
    def __init__(self, decay: float) -> None:
        self.average = get_ema_multi_avg_fn(decay)

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.averaged = AveragedModel(model, multi_avg_fn=self.average, use_buffers=True)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.averaged.update_parameters(model)

    def on_train_end(self, args, state, control, model, **kwargs):
        model.load_state_dict(self.averaged.module.state_dict())


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)

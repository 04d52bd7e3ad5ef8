"""Other perturbed steps that a user could install, inside the Trainer, for benchmark_step.py.

pytorch-optimizer's SAM and LookSAM and temperon's SAM are used as their documentation says. AMP as
released does what the authors' code does, tensor by tensor.
"""

from collections.abc import Callable

import torch
from pytorch_optimizer import SAM, LookSAM
from temperon import Temperon
from transformers import Trainer

RADIUS = 0.1
CYCLE = 5  # steps, of which LookSAM perturbs one
SGD = dict(lr=0.001, momentum=0.9, nesterov=True)


class ClosureTrainer(Trainer):
    """The stock Trainer with an algorithm that takes a closure and runs its own passes.

    The Trainer steps its optimizer without a closure, so `training_step` does all the work.
    """

    def __init__(self, algorithm: Callable, **kwargs) -> None:
        self.algorithm = algorithm
        super().__init__(**kwargs)

    def create_optimizer(self, *args):
        if self.optimizer is None:
            self.perturbed_step = self.algorithm(super().create_optimizer(*args))
            self.optimizer = Stepped(self.model.parameters(), lr=0.0)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        def closure():
            model.zero_grad()
            return super(ClosureTrainer, self).training_step(model, inputs, num_items_in_batch)

        return self.perturbed_step(closure).detach()


class Stepped(torch.optim.SGD):
    """Does nothing when the Trainer steps it: `training_step` has done it."""

    def step(self, closure=None):
        pass


def pytorch_optimizer(cls: type, **options) -> Callable:
    def algorithm(base):
        groups = [{name: g[name] for name in ("params", "weight_decay")} for g in base.param_groups]
        optimizer = cls(groups, torch.optim.SGD, rho=RADIUS, **options, **SGD)

        def step(closure):
            loss = closure()
            optimizer.step(closure)
            return loss

        return step

    return algorithm


def temperon(base):
    return Temperon(base, total_steps=10**9, tail_frac=1.0, rho=RADIUS).step


def released(base):
    """Each tensor has its own ball, and is restored by subtraction."""

    def step(closure):
        loss = closure()
        params = [param for group in base.param_groups for param in group["params"]]
        with torch.no_grad():
            for param in params:
                delta = param.grad.clone()
                norm = delta.norm()
                if norm > RADIUS:
                    delta = delta * (RADIUS / norm)
                param.add_(delta)
                base.state[param]["delta"] = delta
        closure()
        with torch.no_grad():
            for param in params:
                param.sub_(base.state[param].pop("delta"))
        base.step()
        return loss

    return step


# What turns a base optimizer into a step, and whether the weights are restored to the bit.
ALTERNATIVES: dict[str, tuple[Callable, bool]] = {
    "AMP as released": (released, False),
    "SAM, temperon": (temperon, False),
    "SAM, pytorch-optimizer": (pytorch_optimizer(SAM), True),
    "LookSAM, pytorch-optimizer": (pytorch_optimizer(LookSAM, k=CYCLE), True),
}

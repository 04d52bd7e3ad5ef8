import pytest
import reference
import torch
import torch.nn.functional as F
from support import always, make, trainer_for


class Recorder:
    """The batches in the order in which the Trainer asks for them."""

    def __init__(self):
        self.batches = []

    def __call__(self, samples):
        batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


def mlp_loss(batch):
    def loss(theta):
        w1, b1, w2, b2 = theta
        hidden = torch.tanh(batch["pixels"].flatten(1) @ w1.T + b1)
        return F.cross_entropy(hidden @ w2.T + b2, batch["labels"])

    return loss


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("ball", ["global", "tensor", "relative"])
@pytest.mark.parametrize("epsilon", [0.05, 100.0], ids=["on the ball", "inside"])
def test_trajectory_equals_the_reference_in_float64(tmp_path, ball, epsilon, inner_steps):
    config = dict(epsilon=epsilon, inner_lr=0.3, inner_steps=inner_steps, ball=ball)
    model, recorder = make(dtype=torch.float64), Recorder()
    theta = [p.detach().clone() for p in model.parameters()]
    trainer = trainer_for(model, tmp_path, always(**config), trainer={"data_collator": recorder})
    trainer.train()
    for batch in recorder.batches[:8]:
        theta = reference.sgd(theta, reference.amp_gradient(mlp_loss(batch), theta, **config), 0.1)
    for param, expected in zip(model.parameters(), theta):
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-10)

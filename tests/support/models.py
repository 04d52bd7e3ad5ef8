"""Small networks."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
)

from amp_hf.flatness import LossSurface


class MLP(nn.Module):
    """Two layers: small enough for the reference to follow in float64."""

    config = PretrainedConfig()  # the Trainer's label smoothing looks at it

    def __init__(self, hidden=16):
        super().__init__()
        self.fc1 = nn.Linear(64, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, pixels, labels=None):
        logits = self.fc2(torch.tanh(self.fc1(pixels.flatten(1))))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Odd(MLP):
    """Parameters that no two ranks can share evenly, one of a single number."""

    def __init__(self):
        super().__init__(hidden=15)
        self.temperature = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, pixels, labels=None):
        return super().forward(pixels * self.temperature, labels)


class PartlyUsed(MLP):
    """The last layer has no part in the loss."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(16, 4)


class Sharing(nn.Module):
    """Two Parameters over one memory, far apart in the list of parameters."""

    config = PretrainedConfig()

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64, bias=False)
        self.large = nn.Linear(64, 5000)
        self.outer = nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 10)
        self.tie()

    def tie(self):
        self.outer.weight.data = self.inner.weight.data

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self.tie()  # a change of dtype gave each a memory of its own
        return self

    def forward(self, pixels, labels=None):
        hidden = torch.tanh(self.inner(pixels.flatten(1)))
        hidden = torch.tanh(self.outer(hidden)) + self.large(hidden).mean(1, keepdim=True)
        logits = self.head(hidden)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class ConvNet(nn.Module):
    """BatchNorm and dropout: what two passes disturb if they are not careful."""

    config = PretrainedConfig()

    def __init__(self, dropout=0.3):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, pixels, labels=None):
        x = F.relu(self.norm1(self.conv1(pixels)))
        x = F.relu(self.norm2(self.conv2(x)))
        logits = self.fc(self.dropout(x.flatten(1)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def language_model(dropout=0.1):
    """Weighs its loss by tokens, and so asks the Trainer for their number."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=17,
            n_positions=64,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
        )
    )


class Quadratic(nn.Module):
    """L(θ) = ½ (θ − c)ᵀ H (θ − c) for θ of 2 × 3 numbers, times the mean of `weight`."""

    def __init__(self, hessian, theta, centre):
        super().__init__()
        self.register_buffer("hessian", hessian)
        self.register_buffer("centre", centre)
        self.theta = nn.Parameter(theta.reshape(2, 3).clone())

    def forward(self, weight):
        x = self.theta.flatten() - self.centre
        return {"loss": weight.double().mean() * (x @ self.hessian @ x) / 2}


THETA = torch.tensor([3.0, 0.0, 4.0, 1.0, 2.0, 2.0], dtype=torch.float64)  # filters of norm 5 and 3


def quadratic(eigenvalues, centre=THETA):
    """At the bottom of the bowl, unless that is elsewhere."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))
    diagonal = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    return Quadratic(basis @ diagonal @ basis.T, THETA, centre)


def quadratic_surface(*args):
    batches = [{"weight": torch.tensor([0.5, 1.5, 1.0])}, {"weight": torch.tensor([1.0])}]
    return LossSurface(quadratic(*args), batches, progress=False)


def make(net=MLP, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return net().to(dtype)

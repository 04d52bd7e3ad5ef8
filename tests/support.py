"""Small networks on real digits, and trainers over them."""

import functools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments

from amp_hf import AMPConfig, AMPTrainer


@functools.cache
def digits(dtype=torch.float32):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=dtype).reshape(-1, 1, 8, 8)
    return [{"pixels": x, "labels": y} for x, y in zip(images, torch.tensor(labels))]


class MLP(nn.Module):
    """Two layers: small enough for the reference to follow in float64."""

    def __init__(self, hidden=16):
        super().__init__()
        self.fc1 = nn.Linear(64, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, pixels, labels=None):
        logits = self.fc2(torch.tanh(self.fc1(pixels.flatten(1))))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class ConvNet(nn.Module):
    """BatchNorm and dropout: what two passes disturb if they are not careful."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm2 = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, pixels, labels=None):
        x = F.relu(self.norm1(self.conv1(pixels)))
        x = F.relu(self.norm2(self.conv2(x)))
        logits = self.fc(self.dropout(x.flatten(1)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def make(net=MLP, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return net().to(dtype)


def arguments(folder, **kwargs):
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        max_steps=8,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_nan_inf_filter=False,
    )
    return TrainingArguments(**defaults | kwargs)


def trainer_for(model, folder, config=None, *, cls=AMPTrainer, data=None, trainer=None, **kwargs):
    """A trainer; `config` is for `AMPTrainer`, `trainer` holds further Trainer arguments."""
    own = {} if cls is Trainer else {"amp_config": config}
    if data is None:
        data = digits(next(model.parameters()).dtype)
    return cls(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=data,
        **own,
        **(trainer or {}),
    )


def always(**kwargs):
    """Perturbs from the first step on."""
    return AMPConfig(**{"ascent_start": 0.0} | kwargs)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(a, b):
    """Names of the entries that are not equal to the bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]

"""Small networks on real digits, and trainers over them."""

import functools
import itertools
import random
import weakref

import numpy as np
import reference
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    TrainerCallback,
    TrainingArguments,
)

from amp_hf import AMPConfig, AMPTrainer, AMPTrainerMixin
from amp_hf.flatness import LossSurface


@functools.cache
def digits(dtype=torch.float32):
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=dtype).reshape(-1, 1, 8, 8)
    return [{"pixels": x, "labels": y} for x, y in zip(images, torch.tensor(labels))]


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


@functools.cache
def strokes():
    """The inked pixels of each digit in reading order, as tokens: sequences of many lengths."""
    pixels = [(sample["pixels"] * 16).long().flatten() for sample in digits()]
    return [{"input_ids": tokens[tokens > 0]} for tokens in pixels]


def padded(samples):
    tokens = [sample["input_ids"] for sample in samples]
    pad = functools.partial(nn.utils.rnn.pad_sequence, tokens, batch_first=True)
    labels = pad(padding_value=-100)
    return {"input_ids": pad(), "attention_mask": (labels != -100).long(), "labels": labels}


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


class Recorder:
    """A collator that keeps the batches in the order in which the Trainer asks for them."""

    def __init__(self):
        self.batches = []

    def __call__(self, samples):
        batch = {key: torch.stack([s[key] for s in samples]) for key in samples[0]}
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


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


def digit_batches(count, size):
    samples = digits()[:count]
    return [
        {key: torch.stack([s[key] for s in samples[i : i + size]]) for key in samples[0]}
        for i in range(0, count, size)
    ]


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
    own = {"amp_config": config} if issubclass(cls, AMPTrainerMixin) else {}
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


def train(model, folder, config=None, **kwargs):
    trainer = trainer_for(model, folder, config, **kwargs)
    trainer.train()
    return trainer


def on(events, act):
    """A callback that calls `act(event, state, control)` at each of `events`."""

    def method(event):
        return lambda self, args, state, control, **kwargs: act(event, state, control)

    return type("On", (TrainerCallback,), {event: method(event) for event in events})()


def raise_at(model, call, error):
    """The model raises `error` at its `call`-th forward pass from now."""
    calls = itertools.count(1)

    def hook(*_):
        if next(calls) == call:
            raise error

    return model.register_forward_pre_hook(hook)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(a, b):
    """Names of the entries that are not equal to the bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rng_states():
    """Of Python's, NumPy's and torch's generators, comparable by `==`."""
    kind, keys, *rest = np.random.get_state()
    numpy = (kind, keys.tolist(), *rest)
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state().tolist(),
    }


def logs(trainer):
    """The log history without what the clock wrote."""
    timed = ("_runtime", "_per_second")
    return [
        {key: value for key, value in entry.items() if not key.endswith(timed)}
        for entry in trainer.state.log_history
    ]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def outcome(trainer):
    """All that a training leaves behind, comparable by `==`."""
    optimizer = trainer.optimizer.state_dict()
    return {
        "weights": comparable(trainer.model.state_dict()),
        "optimizer": comparable(optimizer),
        "logs": logs(trainer),
        "rng": rng_states(),
    }


def comparable(tree):
    """Tensors as lists: float32 and float64 lose no bit, and `==` says yes or no."""
    if torch.is_tensor(tree):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: comparable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [comparable(value) for value in tree]
    return tree


def train_language_model(folder, config=None, *, dropout=0.1, model=None, **kwargs):
    defaults = dict(per_device_train_batch_size=4, max_steps=4)
    model = model or make(functools.partial(language_model, dropout))
    own = {"data_collator": padded}
    return train(model, folder, config, data=strokes(), trainer=own, **defaults | kwargs)


def mean_loss(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def mlp_loss(batch):
    def loss(theta):
        w1, b1, w2, b2 = theta
        hidden = torch.tanh(batch["pixels"].flatten(1) @ w1.T + b1)
        return F.cross_entropy(hidden @ w2.T + b2, batch["labels"])

    return loss


def recorded(model, folder, config, steps=8, accumulation=1, *, trainer=None, **kwargs):
    """θ before the training, and the windows of micro-batches that `model` was trained on."""
    theta = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    recorder = Recorder()
    own = {"data_collator": recorder} | (trainer or {})
    kwargs |= dict(max_steps=steps, gradient_accumulation_steps=accumulation)
    train(model, folder, config, trainer=own, **kwargs)
    batches = recorder.batches
    return theta, [batches[i * accumulation :][:accumulation] for i in range(steps)]


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


def spoil(model, spoiled, value):
    """Multiplies the loss by `value` in those forward passes for which `spoiled(index)` holds."""
    passes = []

    def hook(module, inputs, output):
        passes.append(None)
        factor = value if spoiled(len(passes) - 1) else 1.0
        return output | {"loss": output["loss"] * factor}

    model.register_forward_hook(hook)


class LiveBytes(TorchDispatchMode):
    """The bytes of the tensors made inside that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result

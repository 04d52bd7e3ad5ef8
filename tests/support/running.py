"""Trainers, and what disturbs them."""

import functools
import itertools
import weakref

import pytest
import torch
from packaging.version import InvalidVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import is_schedulefree_available

from amp_hf import AMPConfig, AMPTrainer, AMPTrainerMixin
from amp_hf.progress import keep

from .data import Recorder, digits, padded, strokes
from .models import language_model, make

BALLS = ["global", "tensor", "elementwise"]
SCOPES = ["micro_batch", "batch"]
ADAMW = dict(
    optim="adamw_torch",
    lr_scheduler_type="cosine",
    warmup_steps=2,
    weight_decay=0.01,
    learning_rate=1e-3,
)


def schedule_free_is_there():
    try:
        return is_schedulefree_available()
    except InvalidVersion:  # transformers 5.0 on Python 3.10 cannot tell which it is
        return False


needs_schedule_free = pytest.mark.skipif(not schedule_free_is_there(), reason="needs schedulefree")


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
    own = {"amp_config": config or always()} if issubclass(cls, AMPTrainerMixin) else {}
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
    """Algorithm 1, from the first step on."""
    return AMPConfig(**{"epsilon": 0.1} | kwargs)


def learnt(loss=0.5, first_loss=100.0, epsilon=None, bend=0.0, past=()):
    """A callback for a training in which ε sets itself: it goes on where the loss has fallen.

    Args:
        past: of the last step, the target, the losses at θ and at θ + Δ, and the rise between them,
            were the loss linear.
    """
    radius = {"epsilon": epsilon, "first_loss": first_loss, "loss": loss, "bend": bend}

    def act(event, state, control):
        keep(state, feedback={"radius": radius, "past": list(past)})

    return on(["on_train_begin"], act)


def train(model, folder, config=None, **kwargs):
    trainer = trainer_for(model, folder, config, **kwargs)
    trainer.train()
    return trainer


def train_language_model(folder, config=None, *, dropout=0.1, model=None, **kwargs):
    defaults = dict(per_device_train_batch_size=4, max_steps=4)
    model = model or make(functools.partial(language_model, dropout))
    own = {"data_collator": padded}
    return train(model, folder, config, data=strokes(), trainer=own, **defaults | kwargs)


def recorded(model, folder, config, steps=8, accumulation=1, *, trainer=None, **kwargs):
    """θ before the training, and the windows of micro-batches that `model` was trained on."""
    theta = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    recorder = Recorder()
    own = {"data_collator": recorder} | (trainer or {})
    kwargs |= dict(max_steps=steps, gradient_accumulation_steps=accumulation)
    train(model, folder, config, trainer=own, **kwargs)
    batches = recorder.batches
    return theta, [batches[i * accumulation :][:accumulation] for i in range(steps)]


def on(events, act):
    """A callback that calls `act(event, state, control)` at each of `events`."""

    def method(event):
        return lambda self, args, state, control, **kwargs: act(event, state, control)

    return type("On", (TrainerCallback,), {event: method(event) for event in events})()


def raise_at(register, call, error):
    """Registers a hook, `register` being a module's method, whose `call`-th call raises `error`."""
    calls = itertools.count(1)

    def hook(*_):
        if next(calls) == call:
            raise error

    return register(hook)


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

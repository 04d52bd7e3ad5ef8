"""Loss functions and models that do as they like."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from support import (
    ADAMW,
    BALLS,
    MLP,
    SCOPES,
    ConvNet,
    always,
    amp_gradient,
    assert_at,
    average,
    comparable,
    differing,
    language_model,
    learnt,
    logged,
    make,
    mean,
    mean_loss,
    mlp_loss,
    padded,
    recorded,
    rng_states,
    spoil,
    strokes,
    train,
    trainer_for,
    weights,
)
from torch import nn
from transformers import Trainer

from amp_hf import AMPConfig, AMPTrainer, AMPTrainerMixin
from amp_hf.compat import HEEDS_LOSS_IS_SCALED


@pytest.mark.parametrize("scope", SCOPES)
def test_a_loss_function_that_counts_items_follows_the_reference(tmp_path, scope):
    config = dict(epsilon=100.0, inner_lr=0.3)
    model = make(dtype=torch.float64)
    theta, windows = recorded(
        model,
        tmp_path,
        always(**config, scope=scope),
        accumulation=2,
        trainer={"compute_loss_func": mean_loss},
    )
    for window in windows:
        losses = [mlp_loss(batch) for batch in window]
        seen = [mean(losses)] * 2 if scope == "batch" else losses
        gradients = [amp_gradient(a, theta, b, **config) for a, b in zip(losses, seen)]
        theta = reference.sgd(theta, average(gradients), 0.1)
    assert_at(model, theta)


def test_asking_what_a_loss_is_divided_by_leaves_every_buffer_as_it_was(tmp_path):
    def trained(**kwargs):
        model = make()
        torch.nn.utils.parametrizations.spectral_norm(model.fc1)  # a step of its own in each pass
        own = {"compute_loss_func": mean_loss}
        train(model, tmp_path, trainer=own, max_steps=3, gradient_accumulation_steps=2, **kwargs)
        return comparable(model.state_dict())

    assert trained(config=AMPConfig()) == trained(cls=Trainer)


def test_label_smoothing_follows_the_reference(tmp_path):
    config = dict(epsilon=100.0, inner_lr=0.3)
    model = make(dtype=torch.float64)
    theta, windows = recorded(model, tmp_path, always(**config), label_smoothing_factor=0.2)
    for (batch,) in windows:

        def loss(theta, batch=batch):
            w1, b1, w2, b2 = theta
            hidden = torch.tanh(batch["pixels"].flatten(1) @ w1.T + b1)
            return F.cross_entropy(hidden @ w2.T + b2, batch["labels"], label_smoothing=0.2)

        theta = reference.sgd(theta, reference.amp_gradient(loss, theta, **config), 0.1)
    assert_at(model, theta)


class FocalTrainer(Trainer):
    """Somebody's trainer, with a loss of its own and an argument of its own."""

    def __init__(self, *args, gamma=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = gamma

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["pixels"])
        loss = focal_loss(outputs["logits"], inputs["labels"], self.gamma)
        return (loss, outputs) if return_outputs else loss


def focal_loss(logits, labels, gamma):
    surprise = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-surprise)) ** gamma * surprise).mean()


class AMPFocalTrainer(AMPTrainerMixin, FocalTrainer):
    pass


def test_mixed_into_another_trainer_amp_uses_that_trainers_loss(tmp_path):
    config = dict(epsilon=0.05, inner_lr=0.3, inner_steps=2)
    model = make(dtype=torch.float64)
    theta, windows = recorded(
        model, tmp_path, always(**config), cls=AMPFocalTrainer, trainer={"gamma": 1.0}
    )
    for (batch,) in windows:

        def loss(theta, batch=batch):
            w1, b1, w2, b2 = theta
            hidden = torch.tanh(batch["pixels"].flatten(1) @ w1.T + b1)
            return focal_loss(hidden @ w2.T + b2, batch["labels"], 1.0)

        theta = reference.sgd(theta, reference.amp_gradient(loss, theta, **config), 0.1)
    assert_at(model, theta)


class Uncounted(MLP):
    """Takes the number of items in the window, as BERT does, and returns its own mean."""

    def forward(self, pixels, labels=None, **kwargs):
        return super().forward(pixels, labels)


class UncountedTrainer(AMPTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, compute_loss_func=self.own_mean, **kwargs)

    @staticmethod
    def own_mean(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("net, cls", [(Uncounted, AMPTrainer), (MLP, UncountedTrainer)])
def test_a_loss_that_ignores_the_window_is_logged_as_by_the_stock_trainer_and_delta_is_the_same(
    tmp_path, net, cls, scope
):
    def run(net, cls, epsilon=100.0):
        # A small network has gradients inside of this ball.
        config = always(epsilon=epsilon, scope=scope)
        options = dict(gradient_accumulation_steps=4, learning_rate=0.0, max_steps=4)
        return train(make(net), tmp_path, config, cls=cls, **options)

    divided, own = run(MLP, AMPTrainer), run(net, cls)
    assert logged(own, "loss") == logged(run(net, cls, epsilon=0.0), "loss")
    assert logged(own, "amp/delta_norm") == pytest.approx(logged(divided, "amp/delta_norm"))
    # The Trainer adds the means up.
    for key in ("loss", "amp/loss", "amp/sharpness"):
        fourfold = [4 * value for value in logged(divided, key)]
        assert logged(own, key) == pytest.approx(fourfold, rel=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("net, cls", [(Uncounted, AMPTrainer), (MLP, UncountedTrainer)])
def test_a_radius_that_sets_itself_is_the_same_for_a_loss_that_ignores_the_window(
    tmp_path, net, cls, scope
):
    def run(net, cls):
        options = dict(gradient_accumulation_steps=4, learning_rate=0.0, max_steps=10)
        own = {"callbacks": [learnt(loss=0.1)]}
        return train(make(net), tmp_path, AMPConfig(scope=scope), cls=cls, trainer=own, **options)

    divided, own = logged(run(MLP, AMPTrainer), "amp/delta_norm"), run(net, cls)
    assert len(divided) == 8 and len(set(divided)) > 3  # it is corrected
    assert logged(own, "amp/delta_norm") == pytest.approx(divided, rel=1e-4)


class Overwritten(Uncounted):
    """Its loss lasts until its next pass, as one in the memory of a CUDA graph does."""

    _last = None

    def forward(self, pixels, labels=None, **kwargs):
        if self._last is not None:
            self._last.fill_(math.nan)
        outputs = super().forward(pixels, labels, **kwargs)
        self._last = outputs["loss"].detach()
        return outputs


@pytest.mark.parametrize(
    ("config", "batches"),
    [
        (always(inner_steps=2), 1),
        (always(scope="batch"), 2),
        (AMPConfig(scope="micro_batch"), 2),  # which asks how the loss is divided
    ],
)
def test_a_loss_is_not_read_after_the_next_pass(tmp_path, config, batches):
    def run(net):
        options = dict(gradient_accumulation_steps=batches, learning_rate=0.0, max_steps=8)
        own = {"callbacks": [learnt(loss=0.1)]} if config.epsilon is None else {}
        return train(make(net), tmp_path, config, trainer=own, **options)

    own, stock = run(Overwritten), run(Uncounted)
    for key in ("loss", "amp/loss", "amp/delta_norm"):
        assert logged(own, key) == logged(stock, key)
        assert len(logged(own, key)) > 3 and all(map(math.isfinite, logged(own, key)))


class DividingTrainer(AMPTrainer):
    """Divides by the micro-batches itself, as `loss_is_scaled_for_ga` is for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs["loss"] / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


@pytest.mark.skipif(not HEEDS_LOSS_IS_SCALED, reason="this Trainer divides every loss")
@pytest.mark.parametrize("scope", SCOPES)
def test_a_loss_that_divides_by_the_micro_batches_itself_is_as_good(tmp_path, scope):
    def run(cls):
        config = always(epsilon=100.0, scope=scope)
        return train(make(), tmp_path, config, cls=cls, gradient_accumulation_steps=4)

    own, divided = run(DividingTrainer), run(AMPTrainer)
    for key in ("loss", "amp/loss", "amp/sharpness", "amp/delta_norm"):
        assert logged(own, key) == pytest.approx(logged(divided, key), rel=1e-3)
    torch.testing.assert_close(weights(own.model), weights(divided.model))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_micro_batch_without_a_label_adds_nothing(tmp_path, scope):
    samples = strokes()[:16]

    class InOrder(torch.utils.data.IterableDataset):
        def __iter__(self):
            for i, sample in enumerate(samples):
                yield {"input_ids": sample["input_ids"], "hide": i % 4 >= 2}

    def collate(rows):
        batch = padded([{"input_ids": row["input_ids"]} for row in rows])
        for labels, row in zip(batch["labels"], rows, strict=True):
            labels[...] = -100 if row["hide"] else labels
        return batch

    runs = []
    for config in (always(scope=scope), AMPConfig(epsilon=0.0)):
        trainer = trainer_for(
            make(lambda: language_model(dropout=0.0)),
            tmp_path,
            config,
            data=InOrder(),
            trainer={"data_collator": collate},
            learning_rate=0.0,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            remove_unused_columns=False,
        )
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=1e-3)
    assert all(math.isfinite(value) for value in logged(runs[0], "amp/sharpness"))


def test_a_parameter_of_the_loss_function_gets_the_outer_gradient_alone(tmp_path):
    def run(config):
        centre = nn.Parameter(torch.zeros(10))

        def loss_func(outputs, labels, num_items_in_batch=None):
            return F.cross_entropy(outputs["logits"] - centre, labels)

        model = make()
        sgd = torch.optim.SGD([*model.parameters(), centre], lr=0.1)
        own = {"compute_loss_func": loss_func, "optimizers": (sgd, None)}
        train(model, tmp_path, config, trainer=own, max_steps=3)
        return centre.detach()

    torch.testing.assert_close(run(always(epsilon=1e-7)), run(AMPConfig(epsilon=0.0)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_an_inner_loss_that_is_not_finite_makes_a_plain_step(tmp_path, inner_steps, ball, value):
    model, stock = make(ConvNet), make(ConvNet)
    spoil(model, lambda i: i % (inner_steps + 1) == inner_steps - 1, value)
    ours = train(model, tmp_path, always(inner_steps=inner_steps, ball=ball), **ADAMW)
    states = [comparable(model.state_dict()), comparable(ours.optimizer.state_dict()), rng_states()]
    theirs = train(stock, tmp_path, cls=Trainer, **ADAMW)
    assert states[0] == comparable(stock.state_dict())
    assert states[1] == comparable(theirs.optimizer.state_dict())
    assert states[2] == rng_states()
    assert logged(ours, "amp/delta_norm") == [0.0] * 8


def test_a_first_ascent_that_is_not_finite_does_not_stop_the_second(tmp_path):
    spoiled, plain = make(dtype=torch.float64), make(dtype=torch.float64)
    spoil(spoiled, lambda i: i % 3 == 0, math.nan)
    train(spoiled, tmp_path, always(inner_steps=2))
    train(plain, tmp_path, always(inner_steps=1))
    assert not differing(weights(spoiled), weights(plain))

"""The steps are those of Algorithm 1, whatever the Trainer does around them."""

import functools

import pytest
import reference
import torch
import torch.nn.functional as F
from support import (
    BALLS,
    MLP,
    SCOPES,
    ConvNet,
    Recorder,
    always,
    amp_gradient,
    assert_at,
    average,
    comparable,
    differing,
    digits,
    logged,
    logs,
    make,
    mean,
    mlp_loss,
    on,
    recorded,
    spoil,
    train,
    train_language_model,
    trainer_for,
    weights,
)
from torch import nn
from torch.func import functional_call
from transformers import Trainer

from amp_hf import AMPConfig

# The trajectory is that of Algorithm 1


def loss_of(model, batch):
    """For models that take more than a line to write down."""
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    return lambda theta: functional_call(model, dict(zip(names, theta)), kwargs=batch)["loss"]


def first_half(batch):
    return {key: value[: len(value) // 2] for key, value in batch.items()}


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("epsilon", [0.05, 100.0], ids=["on the ball", "inside"])
def test_trajectory_equals_the_reference_in_float64(tmp_path, ball, epsilon, inner_steps):
    config = dict(epsilon=epsilon, inner_lr=0.3, inner_steps=inner_steps, ball=ball)
    model = make(dtype=torch.float64)
    theta, windows = recorded(model, tmp_path, always(**config))
    for (batch,) in windows:
        theta = reference.sgd(theta, reference.amp_gradient(mlp_loss(batch), theta, **config), 0.1)
    assert_at(model, theta)


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("epsilon", [0.05, 100.0], ids=["on the ball", "inside"])
def test_trajectory_with_accumulation_equals_the_reference(
    tmp_path, epsilon, fraction, scope, inner_steps
):
    config = dict(epsilon=epsilon, inner_lr=0.3, inner_steps=inner_steps)
    model = make(dtype=torch.float64)
    amp = always(**config, scope=scope, ascent_fraction=fraction)
    theta, windows = recorded(model, tmp_path, amp, 6, 4, per_device_train_batch_size=4)
    for window in windows:
        losses = [mlp_loss(batch) for batch in window]
        seen = losses if fraction == 1 else [mlp_loss(first_half(batch)) for batch in window]
        if scope == "batch":
            seen = [mean(seen)] * 4
        gradients = [amp_gradient(a, theta, b, **config) for a, b in zip(losses, seen)]
        theta = reference.sgd(theta, average(gradients), 0.1)
    assert_at(model, theta)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_shorter_last_window_of_an_epoch_is_a_whole_step(tmp_path, scope):
    config = dict(epsilon=100.0, inner_lr=0.3)
    model, recorder = make(dtype=torch.float64), Recorder()
    theta = [p.detach().clone() for p in model.parameters()]
    train(
        model,
        tmp_path,
        always(**config, scope=scope),
        data=digits(torch.float64)[:18],  # batches of 4, 4, 4, 4 and 2: windows of 3 and 2
        trainer={"data_collator": recorder},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        max_steps=4,
    )
    assert [len(b["labels"]) for b in recorder.batches] == [4, 4, 4, 4, 2] * 2
    for start, end in ((0, 3), (3, 5), (5, 8), (8, 10)):
        losses = [mlp_loss(batch) for batch in recorder.batches[start:end]]
        seen = [mean(losses)] * len(losses) if scope == "batch" else losses
        gradients = [amp_gradient(a, theta, b, **config) for a, b in zip(losses, seen)]
        theta = reference.sgd(theta, average(gradients), 0.1)
    assert_at(model, theta)


class NormMLP(MLP):
    def __init__(self):
        super().__init__()
        self.middle = nn.LayerNorm(16)

    def forward(self, pixels, labels=None):
        logits = self.fc2(torch.tanh(self.middle(self.fc1(pixels.flatten(1)))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize(
    ("perturb", "chosen"),
    [
        ("all", range(6)),
        ("norm", [4, 5]),
        ("fc1", [0, 1]),
        (r"^fc\d\.weight$", [0, 2]),
        (r"bias|middle", [1, 3, 4, 5]),
    ],
)
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_only_the_parameters_that_perturb_names_are_displaced(
    tmp_path, perturb, chosen, inner_steps
):
    config = dict(epsilon=0.5, inner_lr=0.3, inner_steps=inner_steps)
    model = make(NormMLP, dtype=torch.float64)
    theta, windows = recorded(model, tmp_path, always(**config, perturb=perturb))
    for (batch,) in windows:
        gradient = amp_gradient(loss_of(model, batch), theta, chosen=chosen, **config)
        theta = reference.sgd(theta, gradient, 0.1)
    assert_at(model, theta)


def test_only_the_steps_that_the_config_names_are_perturbed(tmp_path):
    model = make(dtype=torch.float64)
    config = AMPConfig(epsilon=0.05, ascent_start=0.25, ascent_every=3)
    theta, windows = recorded(model, tmp_path, config)
    for step, (batch,) in enumerate(windows):
        epsilon = 0.05 if step in (2, 5) else 0.0
        gradient = reference.amp_gradient(mlp_loss(batch), theta, epsilon=epsilon)
        theta = reference.sgd(theta, gradient, 0.1)
    assert_at(model, theta)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_late_start_every_third_step_and_a_part_of_the_batch_combine_as_they_say(
    tmp_path, reuse, fraction, inner_steps, accumulation, scope
):
    """Steps between ascents are plain, or with `ascent_reuse` displaced by the last Δ."""
    config = dict(epsilon=0.5, inner_lr=0.3, inner_steps=inner_steps)
    budget = dict(ascent_start=0.25, ascent_every=3, ascent_fraction=fraction, ascent_reuse=reuse)
    model = make(dtype=torch.float64)
    amp = AMPConfig(**config, **budget, scope=scope)
    theta, windows = recorded(model, tmp_path, amp, 8, accumulation)
    zero = delta = [torch.zeros_like(t) for t in theta]
    for step, window in enumerate(windows):
        gradients = []
        seen = [mlp_loss(batch if fraction == 1 else first_half(batch)) for batch in window]
        if scope == "batch":
            seen = [mean(seen)] * accumulation
        if not reuse:
            delta = zero
        for batch, loss in zip(window, seen):
            if step in (2, 5):
                delta = reference.perturbation(loss, theta, **config)
            there = [t + d for t, d in zip(theta, delta)]
            gradients.append(reference.gradient(mlp_loss(batch), there))
        theta = reference.sgd(theta, average(gradients), 0.1)
    assert_at(model, theta)


class SharedMLP(nn.Module):
    """A layer that is used twice under two names, and a first one that is not trained."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(64, 8).requires_grad_(False)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.two.weight = self.one.weight

    def forward(self, pixels, labels=None):
        x = torch.tanh(self.frozen(pixels.flatten(1)))
        logits = self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("epsilon", [0.05, 100.0], ids=["on the ball", "inside"])
@pytest.mark.parametrize("perturb", ["all", "two|head"])
def test_tied_parameters_are_displaced_once_and_frozen_ones_never(tmp_path, epsilon, perturb):
    config = dict(epsilon=epsilon, inner_lr=0.3, inner_steps=2)
    model = make(SharedMLP, dtype=torch.float64)
    frozen = comparable(model.frozen.state_dict())
    theta, windows = recorded(model, tmp_path, always(**config, perturb=perturb))
    # one.weight (which is two.weight), one.bias, two.bias, head.weight, head.bias
    chosen = range(5) if perturb == "all" else [0, 2, 3, 4]
    for (batch,) in windows:
        gradient = amp_gradient(loss_of(model, batch), theta, chosen=chosen, **config)
        theta = reference.sgd(theta, gradient, 0.1)
    assert_at(model, theta)
    assert comparable(model.frozen.state_dict()) == frozen


# What must not leak into Δ


def test_gradient_clipping_clips_the_outer_gradient_only(tmp_path):
    config = dict(epsilon=100.0, inner_lr=0.3, inner_steps=2)
    model = make(dtype=torch.float64)
    theta, windows = recorded(model, tmp_path, always(**config), max_grad_norm=0.5)
    for (batch,) in windows:
        gradient = reference.amp_gradient(mlp_loss(batch), theta, **config)
        clip = 0.5 / (reference.norm(gradient) + 1e-6)  # torch.nn.utils.clip_grad_norm_
        assert clip < 1
        theta = reference.sgd(theta, [clip * g for g in gradient], 0.1)
    assert_at(model, theta)


def test_delta_does_not_depend_on_accumulation_or_clipping(tmp_path):
    # At learning rate 0, four steps see what the four micro-batches of one step see.
    run = functools.partial(
        train,
        config=always(epsilon=100.0, inner_steps=2),
        learning_rate=0.0,
        per_device_train_batch_size=4,
        max_steps=8,
    )
    alone = logged(run(make(dtype=torch.float64), tmp_path), "amp/delta_norm")
    clipped = run(make(dtype=torch.float64), tmp_path, max_grad_norm=1e-3)
    assert logged(clipped, "amp/delta_norm") == alone
    together = run(make(dtype=torch.float64), tmp_path, gradient_accumulation_steps=4, max_steps=2)
    expected = [sum(alone[:4]) / 4, sum(alone[4:]) / 4]
    # The Trainer's own sums are float64 like the model; the order of additions differs.
    assert logged(together, "amp/delta_norm") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("epsilon", [0.05, 100.0], ids=["on the ball", "inside"])
def test_a_loss_scale_changes_no_bit(tmp_path, epsilon, inner_steps, scope):
    # A real GradScaler, which works on the CPU too: a power of two loses no bit in float32.
    results = []
    for scale in (None, 2.0**10):
        trainer = trainer_for(
            make(),
            tmp_path,
            always(epsilon=epsilon, inner_lr=0.3, inner_steps=inner_steps, scope=scope),
            gradient_accumulation_steps=2,
        )
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        # The Trainer's `grad_norm` is as it finds it, scaled.
        history = [{k: v for k, v in entry.items() if k != "grad_norm"} for entry in logs(trainer)]
        results.append((comparable(trainer.model.state_dict()), history))
    assert results[0] == results[1]


def test_a_loss_scale_that_overflows_skips_the_step_and_reaches_no_weight(tmp_path):
    model = make()
    spoil(model, lambda i: True, 1024.0)  # so large that 2¹²⁷ times it is infinite
    config = always(inner_steps=2)
    trainer = trainer_for(model, tmp_path, config, max_steps=4, learning_rate=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    trainer.accelerator.scaler = scaler
    seen = []
    look = on(["on_step_end"], lambda *_: seen.append(weights(trainer.model)))
    start = weights(trainer.model)
    trainer.add_callback(look)
    trainer.train()
    assert scaler.get_scale() == 2.0**7
    assert not differing(seen[0], start)
    assert differing(seen[1], seen[0])
    assert all(tensor.isfinite().all() for tensor in seen[-1].values())
    assert logged(trainer, "amp/delta_norm")[0] == 0
    assert logged(trainer, "amp/delta_norm")[1:] == pytest.approx([0.1] * 3)


@pytest.mark.gpu
def test_fp16_on_a_gpu_gives_the_delta_of_float32(tmp_path):
    runs = [
        train(
            make(functools.partial(ConvNet, dropout=0.0)),
            tmp_path,
            always(epsilon=100.0, inner_lr=0.1),
            learning_rate=0.0,
            use_cpu=False,
            fp16=fp16,
        )
        for fp16 in (False, True)
    ]
    plain, half = (logged(run, "amp/delta_norm") for run in runs)
    # Half precision has 11 bits; the first steps may be skipped while the scale is found.
    assert half[-4:] == pytest.approx(plain[-4:], rel=0.02)
    assert all(tensor.isfinite().all() for tensor in runs[1].model.state_dict().values())


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("epsilon", [0.05, 100.0], ids=["on the ball", "inside"])
def test_scope_batch_makes_micro_batches_equal_to_the_joined_batch(tmp_path, epsilon, inner_steps):
    models = [make(dtype=torch.float64) for _ in range(3)]
    config = always(epsilon=epsilon, inner_lr=0.3, inner_steps=inner_steps, scope="batch")
    for model, accumulation in zip(models, (1, 2, 8)):
        train(
            model,
            tmp_path,
            config,
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
    joined = [p.detach() for p in models[0].parameters()]
    for model in models[1:]:
        assert_at(model, joined, atol=1e-13)


# Models that weigh their loss by tokens


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_the_logged_loss_of_a_language_model_is_the_clean_loss(tmp_path, inner_steps, scope):
    losses = [
        logged(
            train_language_model(
                tmp_path,
                learning_rate=0.0,
                gradient_accumulation_steps=2,
                per_device_train_batch_size=2,
                **own,
            ),
            "loss",
        )
        for own in (dict(config=always(scope=scope, inner_steps=inner_steps)), dict(cls=Trainer))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # float32


@pytest.mark.parametrize("epsilon", [0.05, 100.0], ids=["on the ball", "inside"])
def test_scope_batch_weighs_tokens_as_in_the_joined_batch(tmp_path, epsilon):
    trainers = [
        train_language_model(
            tmp_path,
            always(epsilon=epsilon, scope="batch"),
            dropout=0.0,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        for accumulation in (1, 4)
    ]
    one, four = (list(trainer.model.parameters()) for trainer in trainers)
    torch.testing.assert_close(one, four, rtol=0, atol=1e-5)  # float32, padded differently
    one, four = (logged(trainer, "amp/delta_norm") for trainer in trainers)
    assert one == pytest.approx(four, rel=1e-5)


def test_a_micro_batch_of_tokens_has_the_delta_that_it_has_alone(tmp_path):
    run = functools.partial(
        train_language_model,
        tmp_path,
        always(epsilon=100.0, scope="micro_batch"),
        dropout=0.0,
        learning_rate=0.0,
        per_device_train_batch_size=2,
    )
    alone = logged(run(max_steps=4), "amp/delta_norm")
    together = logged(run(max_steps=2, gradient_accumulation_steps=2), "amp/delta_norm")
    expected = [(alone[0] + alone[1]) / 2, (alone[2] + alone[3]) / 2]
    assert together == pytest.approx(expected, rel=1e-5)  # float32

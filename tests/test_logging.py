"""What the Trainer logs under AMP."""

import pytest
import reference
import torch
from support import (
    MLP,
    SCOPES,
    ConvNet,
    Recorder,
    always,
    digits,
    logged,
    make,
    mean_loss,
    mlp_loss,
    on,
    train,
    trainer_for,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer

from amp_hf import AMPConfig


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_the_logged_loss_is_the_clean_loss_to_the_bit(tmp_path, accumulation, inner_steps, scope):
    losses = [
        logged(
            train(
                make(ConvNet),
                tmp_path,
                learning_rate=0.0,
                gradient_accumulation_steps=accumulation,
                logging_steps=2,
                max_steps=6,
                **own,
            ),
            "loss",
        )
        for own in (
            dict(config=always(inner_steps=inner_steps, scope=scope)),
            dict(cls=Trainer),
        )
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


@pytest.mark.parametrize("scope", SCOPES)
def test_the_logged_loss_is_the_clean_loss_of_a_loss_function_to_rounding(tmp_path, scope):
    # Under micro_batch, Δ comes from the micro-batch's own mean, which is weighted afterwards.
    losses = [
        logged(
            train(
                make(),
                tmp_path,
                learning_rate=0.0,
                data=digits()[:46],  # with a last batch of 14
                gradient_accumulation_steps=3,
                max_steps=3,
                trainer={"compute_loss_func": mean_loss},
                **own,
            ),
            "loss",
        )
        for own in (dict(config=always(scope=scope)), dict(cls=Trainer))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_sharpness_is_the_difference_of_the_two_losses_and_delta_is_on_the_ball(
    tmp_path, accumulation, scope
):
    trainer = train(
        make(ConvNet),
        tmp_path,
        always(epsilon=0.05, scope=scope),
        gradient_accumulation_steps=accumulation,
        logging_steps=2,
    )
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 4
    for entry in entries:
        difference = entry["amp/loss"] - entry["loss"]
        assert entry["amp/sharpness"] == pytest.approx(difference, abs=1e-6)  # float32
        assert entry["amp/sharpness"] > 1e-3
        assert entry["amp/delta_norm"] == pytest.approx(0.05, rel=1e-6)


def test_the_logged_losses_are_those_of_the_reference(tmp_path):
    config = dict(epsilon=0.5, inner_lr=0.3)
    model, recorder = make(dtype=torch.float64), Recorder()
    theta = [p.detach().clone() for p in model.parameters()]
    trainer = train(model, tmp_path, always(**config), trainer={"data_collator": recorder})
    for batch, entry in zip(recorder.batches, trainer.state.log_history[:8]):
        loss = mlp_loss(batch)
        delta = reference.perturbation(loss, theta, **config)
        at_delta = loss([t + d for t, d in zip(theta, delta)]).item()
        # The Trainer adds up its own losses in float32, AMP in the loss's own precision.
        assert entry["loss"] == pytest.approx(loss(theta).item(), rel=1e-6)
        assert entry["amp/loss"] == pytest.approx(at_delta, rel=1e-12)
        assert entry["amp/sharpness"] == pytest.approx(at_delta - loss(theta).item(), rel=1e-10)
        assert entry["amp/delta_norm"] == pytest.approx(reference.norm(delta).item(), rel=1e-12)
        theta = reference.sgd(theta, reference.amp_gradient(loss, theta, **config), 0.1)


def test_amp_values_are_means_over_the_perturbed_steps_and_absent_where_there_was_none(tmp_path):
    def run(logging_steps):
        config = AMPConfig(epsilon=100.0, ascent_start=0.25, ascent_every=3)
        kwargs = dict(max_steps=12, learning_rate=0.0, logging_steps=logging_steps)
        return train(make(), tmp_path, config, **kwargs)

    entries = [entry for entry in run(1).state.log_history if "loss" in entry]
    keys = ("amp/loss", "amp/sharpness", "amp/delta_norm")
    for step, entry in enumerate(entries):
        assert [key in entry for key in keys] == [step in (3, 6, 9)] * 3
    for key in keys:
        single = [entry[key] for entry in entries if key in entry]
        expected = [single[0], (single[1] + single[2]) / 2]
        assert logged(run(6), key) == pytest.approx(expected, rel=1e-5)
        assert logged(run(2), key) == pytest.approx(single, rel=1e-5)  # of steps 2-3, 6-7 and 8-9


def test_amp_values_of_one_training_are_not_logged_in_the_next(tmp_path):
    trainer = trainer_for(
        make(), tmp_path, AMPConfig(0.1, ascent_start=0.5), max_steps=10, logging_steps=4
    )
    for _ in range(2):
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert [entry["step"] for entry in logs if "amp/loss" in entry] == [8]


def test_amp_values_reach_tensorboard(tmp_path):
    trainer = train(make(), tmp_path, always(), report_to="tensorboard", max_steps=3)
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    for key in ("loss", "amp/loss", "amp/sharpness", "amp/delta_norm"):
        values = [event.value for event in board.Scalars(f"train/{key}")]
        assert values == pytest.approx(logged(trainer, key), rel=1e-6)
        assert len(values) == 3


def test_means_over_many_steps_are_exact_where_the_loss_is_bf16(tmp_path):
    class Half(MLP):
        def forward(self, pixels, labels=None):
            out = super().forward(pixels, labels)
            return out | {"loss": out["loss"].bfloat16()}

    trainer = train(make(Half), tmp_path, always(), max_steps=300, logging_steps=300)
    assert logged(trainer, "amp/delta_norm") == pytest.approx([0.1], rel=1e-4)


def test_what_others_log_in_mid_training_has_no_values_of_ours_and_takes_none_away(tmp_path):
    def run(events):
        def log(event, state, control):
            trainer.log({"loss": 7.0})

        trainer = trainer_for(
            make(),
            tmp_path,
            always(),
            trainer={"callbacks": [on(events, log)]},
            logging_steps=4,
            gradient_accumulation_steps=2,
        )
        trainer.train()
        return trainer

    plain, disturbed = run([]), run(["on_step_begin", "on_substep_end"])
    others = [entry for entry in disturbed.state.log_history if entry.get("loss") == 7.0]
    assert len(others) == 16
    assert not any(key.startswith("amp/") for entry in others for key in entry)
    for key in ("amp/loss", "amp/sharpness", "amp/delta_norm"):
        assert logged(disturbed, key) == logged(plain, key)
        assert len(logged(plain, key)) == 2

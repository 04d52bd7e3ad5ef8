"""What is saved in the middle of a step, and what somebody else logs there."""

import os
import signal

import pytest
import safetensors.torch
import torch
from support import ConvNet, always, logged, make, on, outcome, same, trainer_for, weights

from amp_hf.engine import _Sharded

SCOPES = ["micro_batch", "batch"]


def signalled(model, call, backward):
    """A real signal, in the `call`-th pass from now: while it computes, or on its way back."""
    calls = [0]

    def hook(*_):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGUSR1)

    if backward:
        model.conv2.register_full_backward_hook(hook)
    else:
        model.fc.register_forward_pre_hook(hook)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_signal_handler_that_saves_in_mid_step_saves_theta_and_changes_nothing(
    tmp_path, scope, reuse, backward
):
    every = 2 if reuse else 1
    config = always(inner_steps=2, scope=scope, ascent_every=every, ascent_reuse=reuse)
    options = dict(gradient_accumulation_steps=2, max_steps=3)

    def run(call):
        model, saves, theta = make(ConvNet), [], {}

        def at_step_begin(event, state, control):
            theta.update(weights(model))

        def handler(signum, frame):
            displaced = not torch.equal(model.fc.weight, theta["fc.weight"])
            trainer.save_model(str(tmp_path / "rescued"))
            saved = safetensors.torch.load_file(tmp_path / "rescued" / "model.safetensors")
            names = [name for name, _ in model.named_parameters()]
            assert same([saved[name] for name in names], [theta[name] for name in names])
            saves.append(displaced)

        trainer = trainer_for(
            model,
            tmp_path,
            config,
            trainer={"callbacks": [on(["on_step_begin"], at_step_begin)]},
            **options,
        )
        signalled(model, call, backward)
        before = signal.signal(signal.SIGUSR1, handler)
        try:
            trainer.train()
        finally:
            signal.signal(signal.SIGUSR1, before)
        return saves, outcome(trainer)

    expected = run(0)[1]
    seen = []
    for call in range(1, 7):
        (displaced,), result = run(call)
        seen.append(displaced)
        assert result == expected
    assert set(seen) == {False, True}


def test_where_the_parameters_are_sharded_a_save_in_mid_step_is_refused(tmp_path):
    trainer = trainer_for(make(), tmp_path, always(), max_steps=2)
    caught = []

    def save(*_):
        try:
            trainer.save_model()
        except RuntimeError as error:
            caught.append(str(error))

    def arm(event, state, control):
        if state.global_step == 1:
            engine = trainer._amp_step.run.engine
            engine.at_theta = _Sharded.at_theta.__get__(engine)
            trainer.model.register_forward_pre_hook(save)

    trainer.add_callback(on(["on_step_begin"], arm))
    trainer.train()
    assert len(caught) == 1  # of two passes: the one at θ may save
    assert "set `trainer.control.should_save`" in caught[0] and "\n" not in caught[0]


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

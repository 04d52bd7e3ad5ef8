"""What is saved, also in the middle of a step, and what is said when it is resumed."""

import logging
import os
import signal
import threading

import pytest
import safetensors.torch
import torch
from support import (
    MLP,
    SCOPES,
    ConvNet,
    always,
    differing,
    make,
    on,
    outcome,
    same,
    train,
    trainer_for,
    weights,
)
from transformers import Trainer

from amp_hf import AMPConfig, AMPTrainerMixin
from amp_hf.engine import _Sharded


def test_the_config_lies_beside_every_saved_model(tmp_path):
    config = always(epsilon=0.3, perturb="fc1")
    trainer = train(make(), tmp_path, config, save_strategy="steps", save_steps=2, max_steps=4)
    trainer.save_model()
    trainer.save_model(tmp_path / "elsewhere")
    for folder in ("checkpoint-2", "checkpoint-4", ".", "elsewhere"):
        assert AMPConfig.from_json_file(tmp_path / folder / "amp_config.json") == config
        assert (tmp_path / folder / "model.safetensors").is_file()


@pytest.mark.parametrize("config", [AMPConfig(epsilon=0), AMPConfig(epsilon=0.1)])
def test_a_parent_is_told_who_saves(tmp_path, config):
    """It may do more for the user's own call than for those of the training."""
    told = []

    class Telling(Trainer):
        def save_model(self, output_dir=None, **kwargs):  # all that the Trainer asks for
            told.append(kwargs.get("_internal_call", False))
            super().save_model(output_dir, **kwargs)

    class Ours(AMPTrainerMixin, Telling): ...

    save = dict(save_strategy="steps", save_steps=2)
    train(make(), tmp_path, config, cls=Ours, max_steps=2, **save).save_model()
    assert told == [True, False]


def test_a_save_that_fails_leaves_the_config_of_the_weights_that_are_there(tmp_path):
    trainer = trainer_for(make(MLP), tmp_path, AMPConfig(0.1))
    trainer.save_model()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()  # where no weights can be written
    trainer.amp_config = AMPConfig(0.2)
    with pytest.raises(Exception, match="directory"):
        trainer.save_model()
    assert AMPConfig.from_json_file(tmp_path / "amp_config.json").epsilon == 0.1


@pytest.mark.parametrize("latest", [True, False])
def test_resuming_with_another_config_names_each_field_that_differs(tmp_path, caplog, latest):
    save = dict(save_strategy="steps", save_steps=2)
    train(make(), tmp_path, always(epsilon=0.3), max_steps=2, **save)
    checkpoint = True if latest else str(tmp_path / "checkpoint-2")
    other = always(epsilon=0.2, ball="tensor", scope="batch")
    for config, warnings in ((always(epsilon=0.3), 0), (other, 1)):
        caplog.clear()
        trainer = trainer_for(make(seed=1), tmp_path, config, max_steps=3, **save)
        with caplog.at_level(logging.WARNING, "amp_hf"):
            trainer.train(resume_from_checkpoint=checkpoint)
        messages = [r.getMessage() for r in caplog.records if r.name.startswith("amp_hf")]
        assert len(messages) == warnings
    assert "ball was 'global' and is 'tensor'" in messages[0]
    assert "epsilon was 0.3 and is 0.2" in messages[0]
    assert "scope was None and is 'batch'" in messages[0]
    assert messages[0].count(" was ") == 3


def test_resuming_a_checkpoint_of_the_stock_trainer_does_not_warn(tmp_path, caplog):
    save = dict(save_strategy="steps", save_steps=2)
    train(make(), tmp_path, cls=Trainer, max_steps=2, **save)
    trainer = trainer_for(make(), tmp_path, always(), max_steps=3, **save)
    with caplog.at_level(logging.WARNING, "amp_hf"):
        trainer.train(resume_from_checkpoint=True)
    assert not [r for r in caplog.records if r.name.startswith("amp_hf")]


def test_a_checkpoint_with_a_broken_config_is_resumed_with_a_warning(tmp_path, caplog):
    train(make(), tmp_path, always(), max_steps=2, save_strategy="steps", save_steps=2)
    (tmp_path / "checkpoint-2" / "amp_config.json").write_text("{")
    trainer = trainer_for(make(), tmp_path, always(), max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "amp_config.json cannot be read as a JSON object" in caplog.text


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


@pytest.mark.slow
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


def test_saving_from_another_thread_leaves_the_training_alone(tmp_path):
    ended = threading.Event()
    saved = []

    def save(trainer):
        while not ended.is_set():
            trainer.save_model(str(tmp_path / "saved"))
            saved.append(trainer.state.global_step)

    def run(background):
        trainer = trainer_for(make(), tmp_path, always(), max_steps=60)
        thread = threading.Thread(target=save, args=(trainer,))
        if background:
            thread.start()
        trainer.train()
        ended.set()
        if background:
            thread.join()
        return weights(trainer.model)

    saving = run(True)
    assert len(set(saved)) > 1
    assert not differing(saving, run(False))


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

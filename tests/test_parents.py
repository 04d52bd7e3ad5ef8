"""Mixed into other trainers than the stock one."""

import json
import pickle

import pytest
import torch
from support import MLP, always, arguments, digits, make, outcome, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from amp_hf import AMPConfig, AMPTrainer, AMPTrainerMixin
from amp_hf.checks import check_parent
from amp_hf.progress import Progress


class CountingTrainer(Trainer):
    """Has private attributes of its own, as TRL's GRPOTrainer has `_step`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step = self._window = self._run = self._engine = 0

    def training_step(self, *args, **kwargs):
        self._step += 1
        return super().training_step(*args, **kwargs)


class AMPCountingTrainer(AMPTrainerMixin, CountingTrainer):
    pass


def test_a_parents_private_attributes_are_its_own(tmp_path):
    ours, stock, perturbed, plain = (
        train(make(), tmp_path, **own)
        for own in (
            dict(cls=AMPCountingTrainer, config=AMPConfig(epsilon=0)),
            dict(cls=CountingTrainer),
            dict(cls=AMPCountingTrainer, config=always()),
            dict(config=always()),
        )
    )
    assert ours._step == stock._step == 8
    assert outcome(ours) == outcome(stock)
    assert outcome(perturbed) == outcome(plain)


class Retrying(AMPTrainer):
    """Repeats a step that fails, as it may for want of memory."""

    passes = 0

    def compute_loss(self, *args, **kwargs):
        self.passes += 1
        if self.passes == 4:  # at θ + Δ in the second step
            raise RuntimeError("planted")
        return super().compute_loss(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError:
            return super().training_step(*args, **kwargs)


def test_a_step_that_a_subclass_repeats_counts_once(tmp_path):
    trainer = train(make(), tmp_path, always(), cls=Retrying)
    assert trainer.passes == 2 * 8 + 2
    assert Progress.of(trainer.state) == Progress(ascent_steps=8, perturbed_steps=8, first=0)
    assert outcome(trainer)["weights"] == outcome(train(make(), tmp_path, always()))["weights"]


class Bypassing(AMPTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("config", [AMPConfig(), AMPConfig(epsilon=0.1)])
def test_a_training_step_that_never_comes_to_amp_is_said_to(tmp_path, config, caplog):
    train(make(), tmp_path, config, cls=Bypassing)
    assert "a subclass overrides training_step and does not call super()" in caplog.text


class NoTrainer:
    """As SetFit's Trainer: it has one, and is none."""

    def __init__(self, model=None, args=None, train_dataset=None):
        self.dataloader = DataLoader(train_dataset)


class AMPNoTrainer(AMPTrainerMixin, NoTrainer):
    pass


def test_what_is_no_transformers_trainer_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"AMPNoTrainer is not one: mix it into the Trainer") as it:
        AMPNoTrainer(make(), args=arguments(tmp_path), train_dataset=digits())
    assert "\n" not in str(it.value)


def test_a_mixin_behind_its_trainer_is_refused_where_the_class_is_written():
    with pytest.raises(TypeError, match=r"write class Mine\(AMPTrainerMixin, \.\.\.\)") as it:
        type("Mine", (CountingTrainer, AMPTrainerMixin), {})
    assert "\n" not in str(it.value)
    type("Derived", (AMPCountingTrainer,), {})


def test_trainers_whose_passes_generate_their_batches_are_refused():
    generating = type("GRPOTrainer", (Trainer,), {"__module__": "trl.trainer.grpo_trainer"})
    with pytest.raises(ValueError, match=r"does not support GRPOTrainer: .*epsilon=0") as it:
        check_parent(type("Mine", (AMPTrainerMixin, generating), {}))
    assert "\n" not in str(it.value)
    namesake = type("GRPOTrainer", (Trainer,), {"__module__": "mine"})
    check_parent(type("Mine", (AMPTrainerMixin, namesake), {}))


def test_trackers_show_the_perturbation_and_what_is_saved_does_not(tmp_path):
    seen = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(args.to_dict() | json.loads(args.to_json_string()))
            torch.save(args, tmp_path / "args.bin")  # as a model that is saved here does

    config = always(epsilon=0.3, perturb="fc1")
    trainer = train(
        make(),
        tmp_path,
        config,
        trainer={"callbacks": [Tracker()]},
        report_to="tensorboard",
        max_steps=2,
    )
    (shown,) = seen
    assert {name: shown[f"amp/{name}"] for name in config.to_dict()} == config.to_dict()
    assert shown["learning_rate"] == 0.1
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events)).Reload()
    (text,) = board.Tensors("args/text_summary")
    assert '"amp/epsilon": 0.3' in text.tensor_proto.string_val[0].decode()
    assert not any(name.startswith("amp/") for name in trainer.args.to_dict())
    assert pickle.loads(pickle.dumps(trainer.args)).learning_rate == 0.1


def test_a_callback_that_fails_at_the_beginning_leaves_the_arguments_as_they_were(tmp_path):
    class Failing(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            raise RuntimeError("planted")

    trainer = AMPTrainer(MLP(), arguments(tmp_path), train_dataset=digits(), callbacks=[Failing()])
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert "amp/epsilon" not in trainer.args.to_dict()
    torch.save(trainer.args, tmp_path / "args.bin")

"""What the Trainer logs, saves and refuses, and its features under AMP."""

import logging
import math
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from accelerate import DistributedType, ParallelismConfig
from accelerate.state import AcceleratorState
from support import (
    MLP,
    ConvNet,
    Recorder,
    always,
    amp_gradient,
    arguments,
    assert_at,
    average,
    comparable,
    differing,
    digits,
    language_model,
    logged,
    make,
    mean,
    mean_loss,
    mlp_loss,
    on,
    outcome,
    padded,
    raise_at,
    recorded,
    same,
    strokes,
    train,
    train_language_model,
    trainer_for,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._dynamo.utils import counters
from transformers import Trainer

from amp_hf import AMPConfig, AMPTrainer, AMPTrainerMixin
from amp_hf.checks import check_engine
from amp_hf.parameters import check_perturbable

BALLS = ["global", "tensor", "relative"]
SCOPES = ["micro_batch", "batch"]


# What is logged


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
        make(), tmp_path, AMPConfig(ascent_start=0.5), max_steps=10, logging_steps=4
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


# What is saved


def test_the_config_lies_beside_every_saved_model(tmp_path):
    config = always(epsilon=0.3, perturb="fc1")
    trainer = train(make(), tmp_path, config, save_strategy="steps", save_steps=2, max_steps=4)
    trainer.save_model()
    trainer.save_model(tmp_path / "elsewhere")
    for folder in ("checkpoint-2", "checkpoint-4", ".", "elsewhere"):
        assert AMPConfig.from_json_file(tmp_path / folder / "amp_config.json") == config
        assert (tmp_path / folder / "model.safetensors").is_file()


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
    assert messages[0].count(" was ") == 4  # "than it was trained with", and the three


def test_resuming_a_checkpoint_of_the_stock_trainer_does_not_warn(tmp_path, caplog):
    save = dict(save_strategy="steps", save_steps=2)
    train(make(), tmp_path, cls=Trainer, max_steps=2, **save)
    trainer = trainer_for(make(), tmp_path, always(), max_steps=3, **save)
    with caplog.at_level(logging.WARNING, "amp_hf"):
        trainer.train(resume_from_checkpoint=True)
    assert not [r for r in caplog.records if r.name.startswith("amp_hf")]


# Errors at construction, each one line that says what to do


def sparse_model():
    model = MLP()
    model.embedding = nn.Embedding(4, 4, sparse=True)
    return model


@pytest.mark.parametrize(
    ("model", "config", "kwargs", "message"),
    [
        (
            lambda: MLP().bfloat16(),
            {},
            {},
            r"Parameter fc1\.weight is torch\.bfloat16.*load the model with dtype=torch\.float32 "
            r"and set bf16=True",
        ),
        (
            sparse_model,
            {},
            {},
            r"Module embedding has sparse gradients.*build it with sparse=False, or leave it out "
            r"by AMPConfig\.perturb",
        ),
        (
            MLP,
            dict(perturb="fc3"),
            {},
            r"AMPConfig\.perturb='fc3' matches no trainable parameter of MLP.*fc1\.weight.*use "
            r"'all', 'norm' or an expression that matches",
        ),
        (MLP, dict(perturb="norm"), {}, r"AMPConfig\.perturb='norm' matches no trainable"),
        (lambda: MLP().requires_grad_(False), {}, {}, r"'all' matches no trainable parameter"),
        *(
            (MLP, {}, dict(optim=optim), rf"cannot use optim='{optim}'.*Choose an optimizer that")
            for optim in (
                "lomo",
                "adalomo",
                "galore_adamw_layerwise",
                "galore_adafactor_layerwise",
                "apollo_adamw_layerwise",
            )
        ),
    ],
)
def test_what_amp_would_be_wrong_with_is_refused_in_one_line_that_says_what_to_do(
    tmp_path, model, config, kwargs, message
):
    if kwargs:
        kwargs = kwargs | dict(optim_target_modules="fc")
    with pytest.raises(ValueError, match=message) as caught:
        trainer_for(model(), tmp_path, always(**config), data=digits(), **kwargs)
    assert "\n" not in str(caught.value)
    trainer_for(model(), tmp_path, always(epsilon=0), data=digits(), **kwargs)  # that is stock


@pytest.mark.parametrize(
    "kind, name",
    [
        (DistributedType.MEGATRON_LM, "MEGATRON_LM"),
        (DistributedType.XLA, "XLA"),
        (DistributedType.FSDP, "FSDP version 1"),
    ],
)
def test_an_engine_that_is_not_supported_is_refused(tmp_path, monkeypatch, kind, name):
    trainer = trainer_for(make(), tmp_path, always())
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", kind)
    plugin = SimpleNamespace(fsdp_version=1)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    with pytest.raises(ValueError, match=f"does not support {name}: use one process, DDP"):
        check_engine(trainer.amp_config, trainer.accelerator, trainer.args, trainer.model)


@pytest.mark.parametrize("split", ["tp_size", "cp_size"])
def test_a_model_that_is_split_over_ranks_is_refused(tmp_path, monkeypatch, split):
    trainer = trainer_for(make(), tmp_path, always())
    plan = ParallelismConfig(**{split: 2})
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", plan)
    with pytest.raises(ValueError, match="does not support a model or sequences split over"):
        check_engine(trainer.amp_config, trainer.accelerator, trainer.args, trainer.model)


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn\.DataParallel: start one process a GPU"):
        AMPTrainer(model=make(), args=args, amp_config=always(), train_dataset=digits())


def test_a_dict_for_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be an AMPConfig or None, got \{'epsilon'"):
        trainer_for(make(), tmp_path, {"epsilon": 0.1})


def test_no_config_is_the_default_config(tmp_path):
    assert trainer_for(make(), tmp_path).amp_config == AMPConfig()


# The Trainer's features


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


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("failing", [1, 2, 4], ids=["clean", "second", "later"])
def test_a_smaller_batch_size_is_found_and_trained_from_theta(tmp_path, failing, scope):
    config = dict(epsilon=0.05, scope=scope)
    model, recorder = make(dtype=torch.float64), Recorder()
    passes = []

    def hook(module, args, kwargs):
        passes.append(len(kwargs["pixels"]))
        if passes[-1] > 8 and passes.count(passes[-1]) == failing:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(hook, with_kwargs=True)
    theta = [p.detach().clone() for p in model.parameters()]
    trainer = train(
        model,
        tmp_path,
        always(**config),
        trainer={"data_collator": recorder},
        auto_find_batch_size=True,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=10,
        max_steps=3,
        logging_steps=3,
    )
    assert set(passes) == {10, 9, 8}
    batches = [batch for batch in recorder.batches if len(batch["labels"]) == 8]
    at_theta, at_delta = 0.0, 0.0
    for step in range(3):
        losses = [mlp_loss(batch) for batch in batches[2 * step : 2 * step + 2]]
        seen = [mean(losses)] * 2 if scope == "batch" else losses
        gradients = []
        for loss, ascended in zip(losses, seen):
            delta = reference.perturbation(ascended, theta, epsilon=0.05)
            displaced = [t + d for t, d in zip(theta, delta)]
            gradients.append(reference.gradient(loss, displaced))
            at_theta += loss(theta).item() / 6
            at_delta += loss(displaced).item() / 6
        theta = reference.sgd(theta, average(gradients), 0.1)
    assert_at(model, theta)
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(at_theta, rel=1e-6)  # a float32 sum of the Trainer's
    assert entry["amp/loss"] == pytest.approx(at_delta, rel=1e-10)


def test_a_hyperparameter_search_chooses_the_perturbation_too(tmp_path):
    """Each trial is the training that it says it is."""
    evaluated = {}

    def search_space(trial):
        rate = trial.suggest_float("learning_rate", 0.01, 0.1)
        return {"learning_rate": rate, "epsilon": trial.suggest_float("epsilon", 0.05, 0.2)}

    def searched(**kwargs):
        options = dict(max_steps=2, eval_strategy="epoch", save_strategy="no")
        return AMPTrainer(
            model_init=lambda trial: make(),
            args=arguments(tmp_path, **options | kwargs),
            train_dataset=digits(),
            eval_dataset=digits()[:32],
        )

    def objective(metrics):
        evaluated[trainer.amp_config.epsilon] = metrics["eval_loss"]
        assert logged(trainer, "amp/delta_norm") == pytest.approx([trainer.amp_config.epsilon] * 2)
        return metrics["eval_loss"]

    trainer = searched()
    trainer.amp_config = base = always(epsilon=0.3)
    best = trainer.hyperparameter_search(search_space, objective, n_trials=3, backend="optuna")
    assert trainer.amp_config is base
    assert len(evaluated) == 3
    chosen = best.hyperparameters
    assert evaluated[chosen["epsilon"]] == best.objective == min(evaluated.values())
    alone = searched(learning_rate=chosen["learning_rate"])
    alone.amp_config = always(epsilon=chosen["epsilon"])
    alone.train()
    assert alone.evaluate()["eval_loss"] == best.objective


def test_a_model_from_model_init_is_perturbed_in_every_training(tmp_path):
    def model_init():
        return make()

    trainer = AMPTrainer(
        model_init=model_init,
        args=arguments(tmp_path),
        amp_config=always(perturb="fc1"),
        train_dataset=digits(),
    )
    results = []
    for _ in range(2):
        trainer.train()
        results.append(outcome(trainer))
        assert logged(trainer, "amp/delta_norm") == pytest.approx([0.1] * 8)
    assert results[0] == results[1]
    stock = train(make(), tmp_path, cls=Trainer)
    assert results[0]["weights"] != comparable(stock.model.state_dict())


def test_noise_that_a_forward_hook_draws_is_the_same_in_all_passes(tmp_path):
    # As NEFTune does on embeddings.
    model, noises = make(), []

    def hook(module, inputs, output):
        noises.append(torch.rand_like(output))
        return output + 0.1 * noises[-1]

    model.fc1.register_forward_hook(hook)
    train(model, tmp_path, always(), max_steps=2)
    assert torch.equal(noises[0], noises[1])
    assert torch.equal(noises[2], noises[3])
    assert not torch.equal(noises[1], noises[2])


def test_neftune_and_emptying_the_cache_change_nothing_in_radius_zero_and_work_beyond(tmp_path):
    options = dict(neftune_noise_alpha=5.0, torch_empty_cache_steps=1)
    results = {
        epsilon: comparable(
            train_language_model(tmp_path, always(epsilon=epsilon), **options).model.state_dict()
        )
        for epsilon in (0.0, 0.1)
    }
    stock = train_language_model(tmp_path, cls=Trainer, **options)
    assert results[0.0] == comparable(stock.model.state_dict())
    assert results[0.1] != results[0.0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    options = dict(
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    results = []
    for kwargs in ({}, options):
        trainer = train_language_model(tmp_path, always(inner_steps=2), **kwargs)
        results.append(outcome(trainer))
    for key in ("weights", "optimizer", "rng"):
        assert results[0][key] == results[1][key], key


@pytest.mark.parametrize(
    "config", [{}, {"inner_steps": 2, "scope": "batch"}, {"ascent_start": 0.5}]
)
def test_a_compiled_model_is_compiled_once_and_trains_to_the_bit(tmp_path, config):
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    count = on(["on_step_end"], lambda *_: graphs.append(counters["stats"]["unique_graphs"]))
    # The backend that traces all and computes eagerly: dropout draws the same numbers.
    compiled, eager = (
        train(
            make(ConvNet),
            tmp_path,
            always(**config),
            gradient_accumulation_steps=2,
            trainer={"callbacks": [count]},
            **kwargs,
        )
        for kwargs in ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {})
    )
    assert graphs[:8] == [1] * 8
    assert not differing(weights(compiled.model), weights(eager.model))


def test_training_twice_with_one_trainer_goes_on_from_where_it_was(tmp_path):
    trainer = trainer_for(make(dtype=torch.float64), tmp_path, always())
    trainer.train()
    first, history = weights(trainer.model), len(logged(trainer, "amp/loss"))
    trainer.train()
    assert len(differing(weights(trainer.model), first)) == 4
    assert history == len(logged(trainer, "amp/loss")) == 8


def test_bf16_autocast_over_float32_weights_is_displaced_and_stays_finite(tmp_path):
    trainer = train(make(ConvNet), tmp_path, always(), bf16=True)
    assert logged(trainer, "amp/delta_norm") == pytest.approx([0.1] * 8, rel=1e-6)
    assert all(math.isfinite(loss) for loss in logged(trainer, "amp/loss"))
    for tensor in trainer.model.state_dict().values():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert tensor.isfinite().all()


def test_with_lora_only_the_adapters_are_displaced_and_trained(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapted():
        return get_peft_model(
            language_model(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        )

    model = make(adapted)
    start = weights(model)
    displaced = set()

    def look(module, args):
        now = module.state_dict()
        displaced.update(name for name in now if not torch.equal(now[name], start[name]))

    handle = model.register_forward_pre_hook(look)
    trainer = train_language_model(tmp_path, always(epsilon=0.01), model=model, max_steps=2)
    handle.remove()
    moved = set(differing(weights(model), start))
    assert moved
    assert all("lora_" in name for name in moved)
    assert displaced == moved
    assert logged(trainer, "amp/delta_norm") == pytest.approx([0.01] * 2, rel=1e-6)

    trainer.save_model(tmp_path)
    loaded = PeftModel.from_pretrained(make(language_model), tmp_path)
    tokens = strokes()[0]["input_ids"][None]
    expected = model.eval()(tokens).logits
    assert torch.equal(loaded.eval()(tokens).logits, expected)
    torch.testing.assert_close(loaded.merge_and_unload()(tokens).logits, expected)


# Losses and models that do as they like


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
    def run(net, cls, epsilon=100.0, **own):
        # A small network has gradients inside of this ball.
        config = always(epsilon=epsilon, scope=scope, **own)
        options = dict(gradient_accumulation_steps=4, learning_rate=0.0, max_steps=4)
        return train(make(net), tmp_path, config, cls=cls, **options)

    divided, own = run(MLP, AMPTrainer), run(net, cls)
    assert logged(own, "loss") == logged(run(net, cls, epsilon=0.0), "loss")
    assert logged(own, "amp/delta_norm") == pytest.approx(logged(divided, "amp/delta_norm"))
    # The Trainer adds the means up.
    for key in ("loss", "amp/loss", "amp/sharpness"):
        fourfold = [4 * value for value in logged(divided, key)]
        assert logged(own, key) == pytest.approx(fourfold, rel=1e-3)
    divided, own = (run(*kind, 0.05, ascent_below=4.0) for kind in ((MLP, AMPTrainer), (net, cls)))
    assert max(logged(divided, "amp/delta_norm")) < 0.025  # the loss is above 2
    assert logged(own, "amp/delta_norm") == pytest.approx(logged(divided, "amp/delta_norm"))


class DividingTrainer(AMPTrainer):
    """Divides by the micro-batches itself, as `loss_is_scaled_for_ga` is for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs["loss"] / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("scope", SCOPES)
def test_a_loss_that_divides_by_the_micro_batches_itself_is_as_good(tmp_path, scope):
    def run(cls):
        config = always(epsilon=100.0, scope=scope)
        return train(make(), tmp_path, config, cls=cls, gradient_accumulation_steps=4)

    own, divided = run(DividingTrainer), run(AMPTrainer)
    for key in ("loss", "amp/loss", "amp/sharpness", "amp/delta_norm"):
        assert logged(own, key) == pytest.approx(logged(divided, key), rel=1e-3)
    torch.testing.assert_close(weights(own.model), weights(divided.model))


class UnannouncedTrainer(AMPTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


def test_batches_that_amp_does_not_see_are_refused(tmp_path):
    options = dict(cls=UnannouncedTrainer, max_steps=1)
    assert logged(train(make(), tmp_path, always(), **options), "amp/delta_norm")
    with pytest.raises(ValueError, match=r"UnannouncedTrainer.get_batch_samples must call its"):
        train(make(), tmp_path, always(), gradient_accumulation_steps=2, **options)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 0.0), (float("inf"), 0.0), (-5.0, 0.05)])
def test_no_loss_takes_delta_out_of_the_ball(tmp_path, loss, norm):
    """The loss of labels that are all ignored is NaN, and its gradient zero."""

    class Spoiled(MLP):
        def forward(self, pixels, labels=None):
            outputs = super().forward(pixels, labels)
            value = outputs["loss"]
            return outputs | {"loss": value + (loss - value).detach()}

    config = always(epsilon=0.05, ascent_below=0.5)
    trainer = train(make(Spoiled), tmp_path, config, max_steps=2, logging_nan_inf_filter=False)
    assert logged(trainer, "amp/delta_norm") == pytest.approx([norm, norm])


def test_a_training_whose_ascents_changed_nothing_says_so(tmp_path, caplog):
    train(make(), tmp_path, always(ascent_below=4.0), max_steps=2)
    assert "nothing was perturbed" not in caplog.text
    train(make(), tmp_path, always(ascent_below=0.1), max_steps=2)
    assert "No loss was below AMPConfig.ascent_below=0.1" in caplog.text


@pytest.mark.parametrize("scope", SCOPES)
def test_a_micro_batch_without_a_label_adds_nothing(tmp_path, scope):
    samples = strokes()[:16]
    hidden = [{"input_ids": s["input_ids"], "hide": i % 4 >= 2} for i, s in enumerate(samples)]

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
            data=hidden,
            trainer={"data_collator": collate},
            learning_rate=0.0,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=4,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
        )
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "loss") == pytest.approx(logged(runs[1], "loss"), rel=1e-3)
    assert all(math.isfinite(value) for value in logged(runs[0], "amp/sharpness"))


class ForgetfulTrainer(Trainer):
    """Wipes gradients in its step, as published two-pass trainers do."""

    def training_step(self, model, *args, **kwargs):
        model.zero_grad()
        return super().training_step(model, *args, **kwargs)


class ForgetfulAMPTrainer(AMPTrainerMixin, ForgetfulTrainer):
    pass


def test_a_trainer_that_wipes_gradients_in_its_step_is_perturbed_as_any_other(tmp_path):
    trainer = train(make(), tmp_path, always(), cls=ForgetfulAMPTrainer)
    plain = train(make(), tmp_path, always())
    assert logged(trainer, "amp/delta_norm") == pytest.approx([0.1] * 8)
    assert not differing(weights(trainer.model), weights(plain.model))


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


def test_means_over_many_steps_are_exact_where_the_loss_is_bf16(tmp_path):
    class Half(MLP):
        def forward(self, pixels, labels=None):
            out = super().forward(pixels, labels)
            return out | {"loss": out["loss"].bfloat16()}

    trainer = train(make(Half), tmp_path, always(), max_steps=300, logging_steps=300)
    assert logged(trainer, "amp/delta_norm") == pytest.approx([0.1], rel=1e-4)


def test_freezing_all_that_is_perturbed_stops_with_one_line(tmp_path):
    model = make()

    def freeze(event, state, control):
        if state.global_step == 2:
            model.fc2.requires_grad_(False)

    trainer = {"callbacks": [on(["on_step_begin"], freeze)]}
    with pytest.raises(ValueError, match="perturb='fc2' matches no trainable parameter"):
        train(model, tmp_path, always(perturb="fc2"), trainer=trainer)


def test_a_last_batch_of_few_samples_still_has_two_for_batch_norm(tmp_path):
    data = digits()[:19]  # a batch of 16 and one of 3
    trainer = train(make(ConvNet), tmp_path, always(ascent_fraction=0.25), data=data, max_steps=4)
    assert len(logged(trainer, "amp/loss")) == 4


@pytest.mark.parametrize(
    "added, sizes",
    [
        (lambda size: {"temperature": torch.tensor(2.0)}, (8, 16)),
        (lambda size: {"names": ["x"] * size, "more": {"boxes": [{"n": 3}] * size}}, (8, 16)),
        (lambda size: {"class_weight": torch.ones(10)}, None),
    ],
)
def test_a_part_of_a_batch_is_a_part_of_all_that_it_holds(tmp_path, added, sizes):
    seen = []

    class Greedy(MLP):
        def forward(self, pixels, labels=None, names=None, more=None, **kwargs):
            seen.append({len(pixels), *map(len, filter(None, (names, (more or {}).get("boxes"))))})
            return super().forward(pixels, labels)

    def collate(rows):
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return added(len(rows)) | columns

    options = dict(trainer={"data_collator": collate}, remove_unused_columns=False, max_steps=1)
    if sizes is None:
        with pytest.raises(ValueError, match=r"ascent_fraction=0.5 .* lengths are \[10, 16\]"):
            train(make(Greedy), tmp_path, always(ascent_fraction=0.5), **options)
    else:
        train(make(Greedy), tmp_path, always(ascent_fraction=0.5), **options)
        assert seen == [{size} for size in sizes]


class SkippingTrainer(AMPTrainer):
    """Goes on where a micro-batch does not fit into the memory."""

    def training_step(self, *args, **kwargs):
        try:
            return super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError:
            return torch.tensor(0.0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reuse, failing", [(False, 2), (False, 5), (True, 10), (True, 13)])
def test_a_trainer_that_survives_an_error_perturbs_what_follows(tmp_path, scope, reuse, failing):
    model, lengths = make(), []
    theta = [param.detach().clone() for param in model.parameters()]

    def displacement(*_):
        moved = [(a - b).norm() ** 2 for a, b in zip(model.parameters(), theta)]
        lengths.append(round(sum(moved).sqrt().item(), 4))

    model.register_forward_pre_hook(displacement)
    raise_at(model, failing, torch.OutOfMemoryError("planted"))
    config = always(scope=scope, ascent_reuse=reuse, ascent_every=2 if reuse else 1)
    options = dict(gradient_accumulation_steps=4, learning_rate=0.0, max_steps=3)
    trainer = train(model, tmp_path, config, cls=SkippingTrainer, **options)
    assert set(lengths) == {0.0, 0.1}
    # One pass a micro-batch is at θ + Δ, but for the one whose ascent failed.
    assert lengths.count(0.1) == 11 + (lengths[failing - 1] == 0.1)
    if scope == "micro_batch":  # else the rest of its step is compared with the whole
        assert min(logged(trainer, "amp/sharpness")) > 0
    assert same([param.detach() for param in model.parameters()], theta)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_evaluations_do_not_move_theta_of_a_schedule_free_optimizer(tmp_path, scope, reuse):
    """Its parameters are elsewhere in evaluation: the step moves them back before Δ is added."""

    def run(events):
        def evaluate(event, state, control):
            trainer.evaluate(digits()[:32])

        config = always(
            epsilon=0.5, scope=scope, ascent_reuse=reuse, ascent_every=3 if reuse else 1
        )
        trainer = trainer_for(
            make(),
            tmp_path,
            config,
            optim="schedule_free_sgd",
            gradient_accumulation_steps=2,
            trainer={"callbacks": [on(events, evaluate)]},
        )
        trainer.train()
        trainer.optimizer.eval()
        return weights(trainer.model)

    torch.testing.assert_close(run(["on_step_end", "on_substep_end"]), run([]))


def test_a_checkpoint_with_a_broken_config_is_resumed_with_a_warning(tmp_path, caplog):
    train(make(), tmp_path, always(), max_steps=2, save_strategy="steps", save_steps=2)
    (tmp_path / "checkpoint-2" / "amp_config.json").write_text("{")
    trainer = trainer_for(make(), tmp_path, always(), max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "amp_config.json is not a JSON object" in caplog.text


def test_parameters_on_several_devices_are_refused():
    model = make()
    model.fc2.to("meta")
    with pytest.raises(ValueError, match=r"several devices \(fc1.bias on cpu, fc2.bias on meta\)"):
        check_perturbable(model, "all")
    check_perturbable(model, "fc1")

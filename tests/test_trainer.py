"""The Trainer's features under AMP."""

import copy
import math

import pytest
import reference
import torch
from support import (
    MLP,
    SCOPES,
    ConvNet,
    Recorder,
    always,
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
    mlp_loss,
    needs_schedule_free,
    on,
    outcome,
    raise_at,
    same,
    strokes,
    train,
    train_language_model,
    trainer_for,
    weights,
)
from torch._dynamo.utils import counters
from transformers import Trainer

from amp_hf import AMPConfig, AMPTrainer, AMPTrainerMixin


def test_no_config_is_the_default_config(tmp_path):
    trainer = AMPTrainer(make(), arguments(tmp_path), train_dataset=digits())
    assert trainer.amp_config == AMPConfig()


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


@pytest.mark.slow
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
def test_the_ascents_of_a_trainer_see_a_part_of_all_that_a_batch_holds(tmp_path, added, sizes):
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
    raise_at(model.register_forward_pre_hook, failing, torch.OutOfMemoryError("planted"))
    config = always(scope=scope, ascent_reuse=reuse, ascent_every=2 if reuse else 1)
    options = dict(gradient_accumulation_steps=4, learning_rate=0.0, max_steps=3)
    trainer = train(model, tmp_path, config, cls=SkippingTrainer, **options)
    assert set(lengths) == {0.0, 0.1}
    # One pass a micro-batch is at θ + Δ, but for the one whose ascent failed.
    assert lengths.count(0.1) == 11 + (lengths[failing - 1] == 0.1)
    if scope == "micro_batch":  # else the rest of its step is compared with the whole
        assert min(logged(trainer, "amp/sharpness")) > 0
    assert same([param.detach() for param in model.parameters()], theta)


@needs_schedule_free
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


class Changing(AMPTrainer):
    """Trains on what it makes of a batch."""

    def training_step(self, model, inputs, *args):
        changed = inputs | {"pixels": inputs["pixels"] + torch.rand_like(inputs["pixels"])}
        return super().training_step(model, changed, *args)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_ascent_sees_the_batch_that_a_subclass_makes(tmp_path, scope):
    seen = []
    trainer = trainer_for(make(), tmp_path, always(scope=scope), cls=Changing, max_steps=2)
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixels"].clone()), with_kwargs=True
    )
    trainer.train()
    assert len(seen) == 4
    for ascent, outer in (seen[:2], seen[2:]):
        assert torch.equal(ascent, outer)


class InAutocast(AMPTrainer):
    def training_step(self, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return super().training_step(*args)


def test_autocast_around_the_whole_step_does_not_hide_the_perturbation(tmp_path):
    around = train(make(), tmp_path, always(), cls=InAutocast)
    inside = train(make(), tmp_path, always(), bf16=True)
    assert logged(around, "amp/sharpness") == pytest.approx(
        logged(inside, "amp/sharpness"), rel=0.02
    )
    assert min(logged(around, "amp/sharpness")) > 0


@pytest.mark.parametrize("config", [always(), AMPConfig(epsilon=0)])
def test_a_trainer_can_be_copied(tmp_path, config):
    trainer = trainer_for(make(), tmp_path, config)
    twin = copy.deepcopy(trainer)
    trainer.train()
    assert twin.state.global_step == 0
    twin.train()
    assert outcome(twin) == outcome(trainer)


def test_a_model_that_has_been_made_bf16_since_is_refused_at_the_first_step(tmp_path):
    trainer = trainer_for(make(), tmp_path, AMPConfig(0.1, ascent_start=0.5))
    trainer.model.bfloat16()  # as an evaluation with bf16_full_eval does
    with pytest.raises(ValueError, match=r"would round away: .*bf16_full_eval"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_subclass_that_leaves_the_step_out_is_told_so(tmp_path, caplog):
    class Own(AMPTrainer):
        def training_step(self, model, inputs, *args):
            return Trainer.training_step(self, model, inputs, *args)

    train(make(), tmp_path, always(), cls=Own)
    assert "overrides training_step and does not call super().training_step" in caplog.text

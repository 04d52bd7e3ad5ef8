"""What a step must leave as it was."""

import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from support import (
    MLP,
    ConvNet,
    LiveBytes,
    Recorder,
    always,
    comparable,
    differing,
    digits,
    logged,
    make,
    mean_loss,
    on,
    outcome,
    raise_at,
    rng_states,
    same,
    spoil,
    train,
    train_language_model,
    trainer_for,
    weights,
)
from torch import nn
from transformers import Trainer

from amp_hf import AMPConfig

BALLS = ["global", "tensor", "relative"]
SCOPES = ["micro_batch", "batch"]


# Radius 0, and plain steps, are the stock Trainer


ADAMW = dict(
    optim="adamw_torch",
    lr_scheduler_type="cosine",
    warmup_steps=2,
    weight_decay=0.01,
    learning_rate=1e-3,
)
OPTIONS = {
    "nothing else": {},
    "clipping": dict(max_grad_norm=0.1),
    "AdamW and a schedule": ADAMW,
    "label smoothing": dict(label_smoothing_factor=0.1),
    "a loss function": dict(trainer={"compute_loss_func": mean_loss}),
    "bf16": dict(bf16=True),
    "everything": ADAMW | dict(max_grad_norm=0.1, label_smoothing_factor=0.1, bf16=True),
}


def assert_same_outcome(ours, stock):
    for key, expected in outcome(stock).items():
        assert outcome(ours)[key] == expected, key


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_radius_zero_is_the_stock_trainer_to_the_bit(tmp_path, options, accumulation):
    results = []
    options = options | dict(gradient_accumulation_steps=accumulation, max_steps=4)
    for own in (dict(config=AMPConfig(epsilon=0)), dict(cls=Trainer)):
        results.append(outcome(train(make(ConvNet), tmp_path, **own, **options)))
    for key, expected in results[1].items():
        assert results[0][key] == expected, key


def test_radius_zero_is_the_stock_trainer_to_the_bit_for_a_language_model(tmp_path):
    results = []
    for own in (dict(config=AMPConfig(epsilon=0)), dict(cls=Trainer)):
        trainer = train_language_model(tmp_path, gradient_accumulation_steps=2, **own, **ADAMW)
        results.append(outcome(trainer))
    for key, expected in results[1].items():
        assert results[0][key] == expected, key


@pytest.mark.parametrize("scope", SCOPES)
def test_the_steps_before_ascent_start_are_those_of_the_stock_trainer_to_the_bit(tmp_path, scope):
    snapshots = []
    for own in (dict(config=AMPConfig(ascent_start=0.5, scope=scope)), dict(cls=Trainer)):
        trainer = trainer_for(make(ConvNet), tmp_path, gradient_accumulation_steps=2, **own)

        def look(event, state, control, trainer=trainer):
            snapshots.append((state.global_step, outcome(trainer)))

        trainer.add_callback(on(["on_step_end"], look))
        trainer.train()
    ours, stock = snapshots[:8], snapshots[8:]
    assert ours[:4] == stock[:4]
    assert ours[4] != stock[4]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reuse", [False, True])
def test_while_the_loss_is_too_high_training_is_the_stock_trainers_to_the_bit(
    tmp_path, scope, reuse
):
    gated = always(ascent_below=0.1, scope=scope, inner_steps=2, ascent_every=2, ascent_reuse=reuse)
    ours, stock = (
        train(make(ConvNet), tmp_path, gradient_accumulation_steps=2, **own)
        for own in (dict(config=gated), dict(cls=Trainer))
    )
    assert set(logged(ours, "amp/delta_norm")) == {0.0} == set(logged(ours, "amp/sharpness"))
    assert logged(ours, "loss") == logged(stock, "loss")
    for key in ("weights", "optimizer", "rng"):
        assert outcome(ours)[key] == outcome(stock)[key], key


# The parameters are θ whenever anyone looks

EVENTS = [
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
]


@pytest.mark.parametrize("scope", SCOPES)
def test_callbacks_evaluations_and_checkpoints_never_see_displaced_weights(tmp_path, scope):
    model = make(ConvNet)
    start, seen = [p.detach().clone() for p in model.parameters()], set()
    logits = []

    def look(event, state, control):
        seen.add(event)
        assert same(model.parameters(), start), event

    def metrics(prediction):
        logits.append(torch.tensor(prediction.predictions))
        return {}

    trainer = train(
        model,
        tmp_path,
        always(inner_steps=2, scope=scope, norm_stats="clean"),
        trainer={
            "callbacks": [on(EVENTS, look)],
            "eval_dataset": digits()[:32],
            "compute_metrics": metrics,
        },
        learning_rate=0.0,
        max_steps=2,
        gradient_accumulation_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    assert seen == set(EVENTS)
    for step in (1, 2):
        path = tmp_path / f"checkpoint-{step}" / "model.safetensors"
        saved = safetensors.torch.load_file(path)
        assert same([saved[name] for name, _ in model.named_parameters()], start)
    pixels = torch.stack([sample["pixels"] for sample in digits()[:32]])
    with torch.no_grad():
        expected = trainer.model.eval()(pixels)["logits"]
    torch.testing.assert_close(logits[-1], expected, rtol=0, atol=1e-6)  # batches of another size


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("reuse", [False, True])
def test_an_error_in_any_pass_leaves_the_parameters_at_theta(tmp_path, scope, where, reuse):
    model = make()
    start = weights(model)
    every = 2 if reuse else 1
    trainer = trainer_for(
        model,
        tmp_path,
        always(inner_steps=2, scope=scope, ascent_every=every, ascent_reuse=reuse),
        max_steps=2,
        learning_rate=0.0,
        gradient_accumulation_steps=2,
    )
    errors = [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory."), ValueError("x")]
    # Micro-batches, and two inner passes and an outer one, or that alone.
    passes = 2 * 3 + 2 * (1 if reuse else 3)
    for call in range(1, passes + 2):
        error = errors[call % 3]
        if where == "forward":
            handle = raise_at(model, call, error)
        else:
            handle = raise_in_backward_at(model.fc2, call, error)
        try:
            trainer.train()
            assert call == passes + 1
        except BaseException as caught:
            assert caught is error
        handle.remove()
        assert not differing(weights(model), start), f"pass {call}"
    trainer.train()  # and the trainer is as good as new
    assert not differing(weights(model), start)
    assert len(logged(trainer, "amp/loss")) == 2 // every


def raise_in_backward_at(module, call, error):
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == call:
            raise error

    return module.register_full_backward_pre_hook(hook)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("reuse", [False, True])
def test_an_interrupt_while_the_weights_move_leaves_the_parameters_at_theta(
    tmp_path, monkeypatch, scope, moment, reuse
):
    model = make()
    start = weights(model)
    trainer = trainer_for(
        model,
        tmp_path,
        always(inner_steps=2, scope=scope, ascent_every=2, ascent_reuse=reuse),
        max_steps=2 if reuse else 1,
        learning_rate=0.0,
        gradient_accumulation_steps=2,
    )
    names = [name for name in dir(torch) if name.startswith("_foreach_")]
    for call in range(1, 1000):
        calls = []

        def interrupting(function, call=call, calls=calls):
            def interrupted(*args):
                calls.append(None)
                if len(calls) == call and moment == "before":
                    raise KeyboardInterrupt
                result = function(*args)
                if len(calls) == call:
                    raise KeyboardInterrupt
                return result

            return interrupted

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(torch, name, interrupting(getattr(torch, name)))
            try:
                trainer.train()
                break
            except KeyboardInterrupt:
                assert not differing(weights(model), start), f"foreach call {call}"
    assert len(calls) == call - 1 > 20  # every call was interrupted, and there are as many
    assert not differing(weights(model), start)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("stop", ["should_training_stop", "should_epoch_stop"])
def test_stopping_in_the_middle_of_a_step_leaves_the_parameters_at_theta(tmp_path, scope, stop):
    model, substeps, ends, stops, displaced = make(), [], [], [], []
    start = weights(model)

    def look(*_):
        displaced.append(bool(differing(weights(model), ends[-1] if ends else start)))

    model.register_forward_pre_hook(look)

    def act(event, state, control):
        if event == "on_substep_end":
            substeps.append(state.global_step)
            if len(substeps) == 3 + 3 + 2:
                setattr(control, stop, True)
        elif event == "on_step_end":
            ends.append(weights(model))
        elif len(substeps) == 3 + 3 + 2:
            stops.append(weights(model))

    train(
        model,
        tmp_path,
        always(scope=scope),
        data=digits()[:64],  # an epoch is one step
        gradient_accumulation_steps=4,
        max_steps=4,
        trainer={"callbacks": [on(["on_substep_end", "on_step_end", "on_epoch_end"], act)]},
    )
    rest = [] if stop == "should_training_stop" else [2, 2, 2]
    assert substeps == [0, 0, 0, 1, 1, 1, 2, 2, *rest]
    assert not differing(stops[0], ends[1])
    assert not differing(weights(model), ends[-1])
    assert len(ends) == 2 + len(rest) / 3
    # The step after the one that was cut has its own ascents.
    whole = [False] * 4 + [True] * 4 if scope == "batch" else [False, True] * 4
    part = [False] * 4 + [True] * 2 if scope == "batch" else [False, True] * 2
    assert displaced == whole * 2 + part + (whole if rest else [])


class Branching(MLP):
    """Every second forward pass leaves one layer out: it gets a gradient in those before."""

    def __init__(self):
        super().__init__()
        self.side, self.passes = nn.Linear(64, 16), 0

    def forward(self, pixels, labels=None):
        x = pixels.flatten(1)
        hidden = self.fc1(x) + (self.side(x) if self.passes % 2 == 0 else 0)
        self.passes += 1
        logits = self.fc2(torch.tanh(hidden))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_parameter_without_an_outer_gradient_goes_back_to_theta_too(tmp_path):
    model = make(Branching)
    start = weights(model)
    trainer = train(model, tmp_path, always(perturb="side"))
    assert logged(trainer, "amp/delta_norm") == pytest.approx([0.1] * 8)  # it was displaced
    assert sorted(differing(weights(model), start)) == [
        "fc1.bias",
        "fc1.weight",
        "fc2.bias",
        "fc2.weight",
    ]


def test_a_parameter_without_an_inner_gradient_is_trained_all_the_same(tmp_path):
    model = make(Branching)
    model.passes = 1
    start = weights(model)
    train(model, tmp_path, always())
    assert len(differing(weights(model), start)) == 6


# What the inner passes must not disturb


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_norm_statistics_and_generators_go_on_as_without_a_perturbation(
    tmp_path, accumulation, inner_steps, scope
):
    # At learning rate 0 the weights stay the same, and with them all that the clean passes see.
    results = []
    amp = always(inner_steps=inner_steps, scope=scope)
    for own in (dict(config=amp), dict(cls=Trainer)):
        trainer = train(
            make(ConvNet),
            tmp_path,
            learning_rate=0.0,
            gradient_accumulation_steps=accumulation,
            **own,
        )
        results.append((comparable(trainer.model.state_dict()), rng_states()))
    assert results[0] == results[1]
    assert trainer.model.norm1.num_batches_tracked == 8 * accumulation


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_norm_statistics_of_both_passes_are_taken_on_request(tmp_path, inner_steps):
    trainer = train(make(ConvNet), tmp_path, always(inner_steps=inner_steps, norm_stats="both"))
    assert trainer.model.norm1.num_batches_tracked == 8 * (inner_steps + 1)


def test_norm_statistics_count_one_batch_a_step_where_the_last_delta_is_reused(tmp_path):
    trainer = train(make(ConvNet), tmp_path, always(ascent_every=3, ascent_reuse=True))
    assert trainer.model.norm1.num_batches_tracked == 8


def test_a_step_that_reuses_delta_draws_the_dropout_masks_of_the_stock_trainer(tmp_path):
    results = []
    for own in (dict(config=always(ascent_every=3, ascent_reuse=True)), dict(cls=Trainer)):
        train(make(ConvNet), tmp_path, learning_rate=0.0, **own)
        results.append(rng_states())
    assert results[0] == results[1]


def test_norm_statistics_are_from_theta_while_the_weights_move(tmp_path):
    # The last clean pass of the run, done by hand: momentum 0.1 from the statistics before it.
    model, recorder, befores = make(ConvNet, dtype=torch.float64), Recorder(), []
    look = on(["on_step_begin"], lambda *_: befores.append(weights(model)))
    own = {"data_collator": recorder, "callbacks": [look]}
    train(model, tmp_path, always(), trainer=own, max_steps=3)
    twin = ConvNet().double()
    twin.load_state_dict(befores[2])
    twin(recorder.batches[2]["pixels"])
    names = [name for name in befores[2] if "running" in name or "tracked" in name]
    assert len(names) == 6
    assert all(torch.equal(model.state_dict()[name], twin.state_dict()[name]) for name in names)


class DropoutMLP(MLP):
    """Dropout of what is never zero by itself, so that the mask can be read off."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels, labels=None):
        logits = self.fc2(self.dropout(1 + torch.sigmoid(self.fc1(pixels.flatten(1)))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_all_passes_of_a_micro_batch_draw_the_dropout_masks_of_the_stock_trainer(
    tmp_path, scope, inner_steps
):
    masks = {}
    for kind, own in {
        "ours": dict(config=always(scope=scope, inner_steps=inner_steps)),
        "stock": dict(cls=Trainer),
    }.items():
        model, seen = make(DropoutMLP), masks.setdefault(kind, [])
        model.dropout.register_forward_hook(lambda *a, seen=seen: seen.append(a[2] != 0))
        train(model, tmp_path, max_steps=2, gradient_accumulation_steps=2, **own)
    one, two, three, four = masks["stock"]
    assert not torch.equal(one, two)
    if scope == "batch":
        expected = [one, two] * (inner_steps + 1) + [three, four] * (inner_steps + 1)
    else:
        expected = [mask for mask in (one, two, three, four) for _ in range(inner_steps + 1)]
    assert same(masks["ours"], expected)


# Losses that are not finite


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


def test_a_parameter_that_is_unfrozen_during_training_is_perturbed_from_then_on(tmp_path):
    model = make()
    model.fc1.requires_grad_(False)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(weights(model)))

    def unfreeze(event, state, control):
        if state.global_step == 3:
            model.fc1.requires_grad_(True)

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = {"callbacks": [on(["on_step_begin"], unfreeze)], "optimizers": (sgd, None)}
    train(model, tmp_path, always(), max_steps=6, trainer=trainer)
    moved = [differing(a, b) for a, b in zip(passes[::2], passes[1::2], strict=True)]
    assert moved == [["fc2.weight", "fc2.bias"]] * 3 + [list(passes[0])] * 3


def test_freezing_a_parameter_ends_the_reuse_of_a_delta_that_displaces_it(tmp_path):
    model, passes = make(), []

    def freeze(event, state, control):
        if state.global_step == 2:
            model.fc1.requires_grad_(False)

    model.register_forward_pre_hook(lambda *_: passes.append(weights(model)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = {"callbacks": [on(["on_step_begin"], freeze)], "optimizers": (sgd, None)}
    config = always(ascent_every=4, ascent_reuse=True)
    run = train(model, tmp_path, config, max_steps=4, trainer=trainer)
    assert [entry["step"] for entry in run.state.log_history if "amp/loss" in entry] == [1, 3]
    *_, plain, displaced, reused = passes
    assert not {"fc1.weight", "fc1.bias"} & {
        *differing(plain, displaced),
        *differing(plain, reused),
    }
    assert "fc2.weight" in differing(plain, displaced)


# Memory


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("reuse", [False, True])
def test_training_takes_one_copy_of_the_parameters_and_the_largest_more_than_the_stock_trainer(
    tmp_path, accumulation, scope, reuse
):
    peaks = []
    config = always(scope=scope, ascent_every=2 if reuse else 1, ascent_reuse=reuse)
    for own in (dict(config=config), dict(cls=Trainer)):
        model = make(lambda: MLP(hidden=2048))
        trainer = trainer_for(
            model, tmp_path, max_steps=3, gradient_accumulation_steps=accumulation, **own
        )
        with LiveBytes() as memory:
            trainer.train()
        peaks.append(memory.peak)
    sizes = [param.nbytes for param in model.parameters()]
    assert sum(sizes) / 2 < peaks[0] - peaks[1] <= sum(sizes) + max(sizes)

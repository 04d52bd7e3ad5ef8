"""The parameters are θ whenever anyone looks, and after whatever happens."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from support import (
    MLP,
    SCOPES,
    ConvNet,
    always,
    differing,
    digits,
    logged,
    make,
    on,
    raise_at,
    same,
    train,
    trainer_for,
    weights,
)
from torch import nn

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
            handle = raise_at(model.register_forward_pre_hook, call, error)
        else:
            handle = raise_at(model.fc2.register_full_backward_pre_hook, call, error)
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

"""Parameters that are more, or fewer, than they seem."""

import pytest
import torch
import torch.nn.functional as F
from support import (
    MLP,
    SCOPES,
    Sharing,
    always,
    differing,
    digits,
    logged,
    make,
    on,
    train,
    trainer_for,
    weights,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from amp_hf import AMPConfig
from amp_hf.parameters import check_perturbable, perturbed_parameters


class Tied(Sharing):
    """The same with one Parameter in both places."""

    def tie(self):
        self.outer.weight = self.inner.weight


class LargeTable(nn.Module):
    """A tied embedding that changes places in pieces."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9000, 32)
        self.body = nn.Linear(32, 32)
        self.output = nn.Linear(32, 9000, bias=False)
        self.output.weight.data = self.table.weight.data

    def forward(self, pixels, labels=None):
        tokens = (pixels.flatten(1) * 16).long()
        logits = self.output(torch.tanh(self.body(self.table(tokens).mean(1))))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_what_wrappers_add_to_the_names_changes_nothing_of_what_they_match():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.ModuleDict({"layers": nn.ModuleList([inner]), "head": nn.Linear(2, 2)})

    def chosen(pattern):
        return [id(param) for param in perturbed_parameters(model, pattern).values()]

    patterns = (r"layers\.\d+\.0", r"^head", "layers.0.1|head")
    before = [chosen(pattern) for pattern in patterns]
    assert [len(params) for params in before] == [2, 2, 4]
    model["layers"][0] = torch.compile(checkpoint_wrapper(inner))  # as FSDP2 does
    assert "._orig_mod._checkpoint_wrapped_module." in next(model.named_parameters())[0]
    assert [chosen(pattern) for pattern in patterns] == before


@pytest.mark.parametrize("net", [Sharing, LargeTable])
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("own", [{}, dict(scope="batch"), dict(ascent_every=2, ascent_reuse=True)])
def test_parameters_that_share_memory_come_back_to_the_bit(tmp_path, net, inner_steps, own):
    model = make(net)
    start = weights(model)
    config = always(inner_steps=inner_steps, **own)
    train(
        model,
        tmp_path,
        config,
        learning_rate=0.0,
        max_steps=6,
        gradient_accumulation_steps=2,
    )
    assert not differing(weights(model), start)


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("epsilon", [0.05, 100.0])
def test_parameters_that_share_memory_are_perturbed_as_one(tmp_path, inner_steps, epsilon):
    runs = {}
    for net in (Sharing, Tied):
        config = always(epsilon=epsilon, inner_lr=0.3, inner_steps=inner_steps)
        runs[net] = train(make(net, dtype=torch.float64), tmp_path, config)
    # Plain SGD adds up what the two Parameters are given, as autograd does for the one.
    ours, tied = (weights(runs[net].model) for net in (Sharing, Tied))
    for name, value in tied.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-10)
    assert logged(runs[Sharing], "amp/delta_norm") == pytest.approx(
        logged(runs[Tied], "amp/delta_norm")
    )


class Grown(MLP):
    """Gets a further layer in the middle of its training."""

    def grow(self, trainer):
        self.extra = nn.Linear(64, 10)
        nn.init.zeros_(self.extra.weight)
        trainer.optimizer.param_groups[0]["params"].extend(self.extra.parameters())

    def forward(self, pixels, labels=None):
        logits = self.fc2(torch.tanh(self.fc1(pixels.flatten(1))))
        if hasattr(self, "extra"):
            logits = logits + self.extra(pixels.flatten(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reuse", [False, True])
def test_a_layer_that_is_added_is_perturbed_and_gets_the_outer_gradient_alone(
    tmp_path, scope, reuse
):
    gradients = {}

    def run(config):
        model = make(Grown)
        seen = gradients[config] = []

        def act(event, state, control):
            if event == "on_step_begin" and state.global_step == 2:
                torch.manual_seed(1)
                model.grow(trainer)
            if event == "on_pre_optimizer_step" and state.global_step >= 2:
                seen.append(model.extra.weight.grad.norm().item())

        callbacks = {"callbacks": [on(["on_step_begin", "on_pre_optimizer_step"], act)]}
        trainer = trainer_for(model, tmp_path, config, trainer=callbacks, max_steps=4)
        trainer.train()
        return model

    tiny = dict(scope=scope, ascent_reuse=reuse, ascent_every=4 if reuse else 1)
    run(always(epsilon=1e-7, **tiny))
    run(AMPConfig(epsilon=0))
    ours, plain = gradients.values()
    assert ours == pytest.approx(plain, rel=1e-4)

    model, displaced = make(Grown), []

    def look(module, inputs):
        if hasattr(module, "extra"):
            displaced.append(module.extra.weight.norm().item())

    def act(event, state, control):
        if state.global_step == 2:
            model.grow(trainer)

    model.register_forward_pre_hook(look)
    callbacks = {"callbacks": [on(["on_step_begin"], act)]}
    options = dict(trainer=callbacks, max_steps=3, learning_rate=0.0)
    trainer = trainer_for(model, tmp_path, always(**tiny), **options)
    trainer.train()
    assert displaced[0] == 0.0 < displaced[1]
    assert model.extra.weight.norm() == 0


def test_complex_parameters_are_refused_for_what_they_are():
    model = make()
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"Parameter phase is torch\.complex64.*real and imagin"):
        check_perturbable(model, "all")
    check_perturbable(model, "fc")


def optimizers_in_hooks(model):
    """As in PyTorch's tutorial on fusing the optimizer step into the backward pass."""
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused_by_the_constructor(tmp_path):
    model = make()
    optimizers_in_hooks(model)
    with pytest.raises(ValueError, match=r"Parameter fc1\.weight.*post_accumulate_grad_hook") as it:
        trainer_for(model, tmp_path, always(), data=digits())
    assert "\n" not in str(it.value)
    train(model, tmp_path, AMPConfig(epsilon=0), max_steps=1)  # that is the stock Trainer


def test_an_optimizer_that_is_hooked_in_by_create_optimizer_is_refused_before_the_first_step(
    tmp_path,
):
    from amp_hf import AMPTrainer

    class InHooks(AMPTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizers_in_hooks(self.model)
            return super().create_optimizer(*args, **kwargs)

    model = make()
    start = weights(model)
    with pytest.raises(ValueError, match="post_accumulate_grad_hook"):
        train(model, tmp_path, AMPConfig(0.1, ascent_start=0.5), cls=InHooks)
    assert not differing(weights(model), start)


def test_reuse_that_is_switched_off_in_mid_run_ends_at_once(tmp_path):
    passes, model = [], make()
    model.register_forward_pre_hook(lambda *_: passes.append(trainer.state.global_step))

    def switch_off(event, state, control):
        if state.global_step == 4:
            trainer.amp_config = always(ascent_every=4)

    config = always(ascent_every=4, ascent_reuse=True)
    trainer = trainer_for(
        model,
        tmp_path,
        config,
        trainer={"callbacks": [on(["on_step_begin"], switch_off)]},
        max_steps=6,
        save_strategy="steps",
        save_steps=3,  # after which there is an ascent
    )
    trainer.train()
    assert [passes.count(step) for step in range(6)] == [2, 1, 1, 2, 2, 1]


class Transposed(Sharing):
    """The second Parameter is the first one's transpose, as in a tied autoencoder."""

    def tie(self):
        self.outer.weight.data = self.inner.weight.data.t()


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_a_parameter_and_its_transpose_are_displaced_by_epsilon_together(tmp_path, inner_steps):
    model, lengths = make(Transposed), []
    theta = {name: value.clone() for name, value in model.state_dict().items()}

    def look(*_):
        moved = [
            value - theta[name] for name, value in model.state_dict().items() if "outer" not in name
        ]
        lengths.append(torch.stack([part.norm() for part in moved]).norm().item())

    model.register_forward_pre_hook(look)
    config = always(epsilon=0.01, inner_steps=inner_steps)
    train(model, tmp_path, config, learning_rate=0.0, max_steps=1)
    assert lengths == pytest.approx([0.0, *[0.01] * inner_steps], rel=1e-4)


def test_a_perturbation_that_a_callback_switches_on_is_checked_as_at_construction(tmp_path):
    model = make()
    optimizers_in_hooks(model)

    def switch_on(event, state, control):
        trainer.amp_config = always()

    callbacks = {"callbacks": [on(["on_step_begin"], switch_on)]}
    trainer = trainer_for(model, tmp_path, AMPConfig(epsilon=0), trainer=callbacks)
    with pytest.raises(ValueError, match="post_accumulate_grad_hook"):
        trainer.train()

"""What AMP would be wrong with is refused in one line that says what to do."""

from types import SimpleNamespace

import pytest
from accelerate import DistributedType, ParallelismConfig
from accelerate.state import AcceleratorState
from support import (
    MLP,
    always,
    arguments,
    differing,
    digits,
    language_model,
    logged,
    make,
    on,
    padded,
    strokes,
    train,
    trainer_for,
    weights,
)
from torch import nn
from transformers import Trainer

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.checks import _check_deepspeed, check_engine
from amp_hf.parameters import check_perturbable


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
        (
            lambda: MLP().requires_grad_(False),
            {},
            {},
            r"'all' matches no trainable parameter of MLP, all of which are frozen: unfreeze some",
        ),
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


def test_a_frozen_model_can_be_evaluated(tmp_path):
    model = make().requires_grad_(False)
    ours, stock = (
        cls(model=model, args=arguments(tmp_path), eval_dataset=digits()[:8])
        for cls in (AMPTrainer, Trainer)
    )
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]


def test_a_model_in_half_precision_can_be_evaluated_and_not_trained(tmp_path):
    kwargs = dict(args=arguments(tmp_path), eval_dataset=strokes()[:8], data_collator=padded)
    ours, stock = (
        cls(model=make(language_model).bfloat16(), **kwargs) for cls in (AMPTrainer, Trainer)
    )
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]
    ours.train_dataset = strokes()
    with pytest.raises(ValueError, match="in which a perturbation would round away"):
        ours.train()


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


@pytest.mark.parametrize(
    "config",
    [
        dict.fromkeys(["bf16", "fp16", "torch_autocast", "zero_optimization", "compile"]),
        {"zero_optimization": {"stage": 2, "offload_param": None, "zenflow": None}},
        {"tensor_parallel": {"autotp_size": 1}, "compile": {"deepcompile": False}},
        {"expert_parallel": {"enabled": False, "autoep_size": 2}, "tensor_parallel": None},
        {"zero_optimization": {"offload_optimizer": None, "zero_quantized_weights": False}},
    ],
)
def test_a_section_of_deepspeeds_that_is_null_is_none(config):
    _check_deepspeed(SimpleNamespace(deepspeed_config=config, zero_stage=2))


@pytest.mark.parametrize(
    ("config", "option"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "expert_parallel.autoep_size"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
        ({"zero_optimization": {"zenflow": {}}}, "zero_optimization.zenflow"),
        (
            {"zero_optimization": {"offload_optimizer": {"super_offload": True}}},
            "zero_optimization.offload_optimizer.super_offload",
        ),
        (
            {"zero_optimization": {"zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights",
        ),
    ],
)
def test_an_option_of_deepspeeds_with_which_delta_would_be_wrong_is_refused(config, option):
    plugin = SimpleNamespace(deepspeed_config=config, zero_stage=3)
    with pytest.raises(ValueError, match=f"does not support DeepSpeed's {option}: take it out"):
        _check_deepspeed(plugin)


def test_a_deepspeed_that_lacks_what_an_ascent_needs_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.19.0")
    with pytest.raises(ValueError, match=r"needs DeepSpeed 0\.19\.1 or newer: pip install -U"):
        _check_deepspeed(SimpleNamespace(deepspeed_config={}, zero_stage=2))


SIZES = [name for name in ("tp_size", "cp_size", "sp_size") if hasattr(ParallelismConfig, name)]


@pytest.mark.parametrize("split", SIZES)
def test_a_model_that_is_split_over_ranks_is_refused(tmp_path, monkeypatch, split):
    trainer = trainer_for(make(), tmp_path, always())
    plan = ParallelismConfig(**{split: 2})
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", plan)
    with pytest.raises(ValueError, match="tp_size, cp_size or sp_size > 1 in parallelism_config"):
        check_engine(trainer.amp_config, trainer.accelerator, trainer.args, trainer.model)


def test_a_plan_that_splits_neither_tensors_nor_sequences_is_not_refused(tmp_path, monkeypatch):
    trainer = trainer_for(make(), tmp_path, always())
    plan = ParallelismConfig(dp_replicate_size=2)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", plan)
    check_engine(trainer.amp_config, trainer.accelerator, trainer.args, trainer.model)


def test_a_model_that_transformers_has_split_is_refused(tmp_path):
    model = make()
    model.is_distributed_loading_by_transformers = True  # as `from_pretrained` marks it
    with pytest.raises(
        ValueError, match="does not support a model that `from_pretrained` has split"
    ):
        trainer_for(model, tmp_path, always())


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"nn\.DataParallel: start one process a GPU"):
        AMPTrainer(model=make(), args=args, amp_config=always(), train_dataset=digits())


def test_a_dict_for_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be an AMPConfig or None, got \{'epsilon'"):
        trainer_for(make(), tmp_path, {"epsilon": 0.1})


def test_parameters_on_several_devices_are_refused():
    model = make()
    model.fc2.to("meta")
    with pytest.raises(ValueError, match=r"several devices \(fc1.bias on cpu, fc2.bias on meta\)"):
        check_perturbable(model, "all")
    check_perturbable(model, "fc1")


def test_freezing_all_that_is_perturbed_stops_with_one_line(tmp_path):
    model = make()

    def freeze(event, state, control):
        if state.global_step == 2:
            model.fc2.requires_grad_(False)

    trainer = {"callbacks": [on(["on_step_begin"], freeze)]}
    with pytest.raises(ValueError, match="perturb='fc2' matches no trainable parameter"):
        train(model, tmp_path, always(perturb="fc2"), trainer=trainer)


class UnannouncedTrainer(AMPTrainer):
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


def test_batches_that_amp_does_not_see_are_refused(tmp_path):
    options = dict(cls=UnannouncedTrainer, max_steps=1)
    assert logged(train(make(), tmp_path, always(), **options), "amp/delta_norm")
    options |= dict(gradient_accumulation_steps=2, max_steps=2)
    for config in (always(), AMPConfig(epsilon=0.1, ascent_start=0.5)):  # before anything is lost
        model = make()
        before = weights(model)
        with pytest.raises(ValueError, match=r"Trainer\.get_batch_samples must call"):
            train(model, tmp_path, config, **options)
        assert not differing(weights(model), before)

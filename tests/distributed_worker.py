"""One rank of test_distributed.py."""

import contextlib
import copy
import functools
import gc
import os
import signal
from collections import Counter

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from peft import LoraConfig, get_peft_model
from support import (
    MLP,
    ConvNet,
    Odd,
    PartlyUsed,
    Sharing,
    always,
    digits,
    language_model,
    learnt,
    logs,
    make,
    on,
    padded,
    raise_at,
    strokes,
    trainer_for,
)
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from amp_hf import AMPTrainer


class Stream(torch.utils.data.IterableDataset):
    """Has no length."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


def lora():
    model = language_model(dropout=0.0)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))


def partly_frozen():
    model = MLP()
    model.fc1.bias.requires_grad_(False)
    return model


def channels_last():
    return ConvNet(dropout=0.0).to(memory_format=torch.channels_last)


# A network, and the class of its layers that FSDP shards one by one.
NETS = {
    "mlp": (MLP, "Linear"),
    "conv": (functools.partial(ConvNet, dropout=0.0), "Conv2d"),
    "dropout": (ConvNet, "Conv2d"),
    "channels_last": (channels_last, "Conv2d"),
    "odd": (Odd, "Linear"),
    "partly_used": (PartlyUsed, "Linear"),
    "partly_frozen": (partly_frozen, "Linear"),
    "sharing": (Sharing, "Linear"),
    "gpt2": (functools.partial(language_model, dropout=0.0), "GPT2Block"),
    "lora": (lora, "GPT2Block"),
}


class Watched(AMPTrainer):
    """Keeps the micro-batches of every step."""

    windows = ()

    def get_batch_samples(self, *args):
        window, num_items = super().get_batch_samples(*args)
        if window:
            self.windows = [*self.windows, copy.deepcopy(window)]
        return window, num_items


class WithItsOwnLoss(Watched):
    """The mean over a micro-batch, though the items of all ranks are counted."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class WithItsOwnLossDivided(WithItsOwnLoss):
    """By the Trainer, by the micro-batches."""

    loss_is_scaled_for_ga = False


TRAINERS = {"": Watched, "mean": WithItsOwnLoss, "divided": WithItsOwnLossDivided}


def run(folder, cut=None, refused=False, raises=None, **case):
    """What `train` returns.

    Args:
        cut: the run is stopped after so many steps, and resumed by another trainer from the
            checkpoint saved there.
        refused: what the refusal says, instead, by the constructor or in the first step.
        raises: the pass ("forward" or "backward") that raises at θ + Δ in the second step; returns
            the weights and the evaluation's loss, before that step and after.
    """
    if raises:
        return before_and_after(trainer_of(folder, eval_dataset=True, **case), raises)
    if refused:
        try:
            trainer_of(folder, **case).train()
        except ValueError as error:
            return str(error)
        raise AssertionError("was not refused")
    if cut is None:
        return train(folder, **case)
    case |= {"save_strategy": "steps", "save_steps": cut}
    first = train(folder, stop=cut, **case)
    rest = train(folder, resume=True, **case)
    return {key: first[key] + rest[key] for key in first}


def train(folder, stop=None, killed=None, resume=None, first_logs=False, counted=False, **case):
    """Returns the micro-batches and the weights of every step, the logs, and the collectives.

    Args:
        first_logs: whether the first rank logs a loss of its own after every step.
        counted: whether the collectives are counted, which doubles the time.
    """
    windows, weights = [], []

    def at_step_end(event, state, control):
        windows.append(trainer.windows)
        trainer.windows = ()
        weights.append(whole(trainer.model))
        control.should_training_stop |= state.global_step == stop
        if first_logs and distributed.get_rank() == 0:
            should_log = control.should_log
            trainer.log({"loss": 7.0})
            control.should_log = should_log

    def in_mid_step(event, state, control):
        if state.global_step == killed and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.eval_dataset is not None:
            trainer.evaluate()  # between two micro-batches

    trainer = trainer_of(folder, **case)
    trainer.add_callback(on(["on_step_end"], at_step_end))
    trainer.add_callback(on(["on_substep_end"], in_mid_step))
    communication = CommDebugMode()
    with communication if counted else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=resume)
    return {
        "windows": windows,
        "weights": weights,
        "logs": logs(trainer),
        "collectives": Counter({str(op): n for op, n in communication.comm_counts.items()}),
    }


def before_and_after(trainer, raises):
    seen = []

    def look():
        loss = trainer.evaluate()["eval_loss"]
        seen.append((whole(trainer.model), loss))

    def arm(event, state, control):
        if state.global_step == 1:
            look()
            error = RuntimeError("planted")
            if raises == "forward":
                raise_at(trainer.model.fc2.register_forward_pre_hook, 2, error)
            else:
                raise_at(trainer.model.fc1.register_full_backward_hook, 2, error)

    trainer.add_callback(on(["on_step_begin"], arm))
    try:
        trainer.train()
    except RuntimeError as error:
        assert "planted" in str(error)
        look()
    return seen


def trainer_of(
    folder,
    engine="plain",
    net="mlp",
    config=None,
    ddp=None,
    deepspeed=None,
    fsdp=None,
    samples=None,
    stream=False,
    loss_scale=None,
    own_loss="",
    eval_dataset=False,
    begins=None,
    half_weights=False,
    partly_offloaded=False,
    **kwargs,
):
    network, layer = NETS[net]
    dtype = torch.float32 if "zero" in engine or "bf16" in kwargs else torch.float64
    tokens = net in ("gpt2", "lora")
    data = (strokes() if tokens else digits(dtype))[:samples]
    defaults = dict(per_device_train_batch_size=4, max_steps=3)
    if engine == "fsdp2":
        fsdp = {"transformer_layer_cls_to_wrap": [layer]} | (fsdp or {})
        defaults |= {"fsdp": True, "fsdp_config": fsdp}
    elif engine.startswith("zero"):
        defaults |= {"deepspeed": deepspeed_config(int(engine[-1]), **(deepspeed or {}))}
    model = make(network, dtype=dtype)
    if half_weights:  # as many a checkpoint has them
        model = model.bfloat16()
        model = model if engine == "fsdp2" else model.float()
    trainer = trainer_for(
        model,
        folder,
        always(**{"epsilon": 0.05} | (config or {})),
        cls=TRAINERS[own_loss],
        data=Stream(data) if stream else data,
        trainer={
            "data_collator": padded if tokens else None,
            "eval_dataset": data[:64] if eval_dataset else None,
            "callbacks": [learnt(**begins)] if begins else None,
        },
        **defaults | kwargs,
    )
    if partly_offloaded:
        trainer.add_callback(on(["on_train_begin"], functools.partial(offload_in_part, trainer)))
    if ddp:
        trainer.accelerator.ddp_handler = DistributedDataParallelKwargs(**ddp)
    if loss_scale:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    return trainer


def deepspeed_config(stage, zero_optimization=None, **options):
    taken_over = (
        "train_micro_batch_size_per_gpu",
        "train_batch_size",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    # ZeRO-3 does not partition parameters below the threshold: have some on both sides.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    options["zero_optimization"] = zero | (zero_optimization or {})
    return dict.fromkeys(taken_over, "auto") | options


def offload_in_part(trainer, event, state, control):
    """What DeepSpeed does with offload_optimizer's `ratio`, on accelerators only."""
    zero = trainer.model_wrapped.optimizer
    zero.subgroup_to_device[0] = "an accelerator"
    zero.backup_optimizer = type(zero.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    zero.backup_optimizer.param_groups = zero.optimizer.param_groups


def shard_on_the_cpu():
    """Accelerate takes its FSDP plugin on accelerators only."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init_with_fsdp


def compile_nothing():
    """DeepSpeed takes minutes to compile collectives that only inference uses, on CPUs."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def whole(model):
    """The parameters, gathered from all ranks."""
    return {
        name.replace("_orig_mod.", ""): whole_tensor(param).detach().cpu().clone()
        for name, param in model.named_parameters()
    }


def whole_tensor(param):
    if isinstance(param, DTensor):
        return param.full_tensor()
    if hasattr(param, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([param]):
            return param.clone()
    return param


def run_all(folder, engine, runs):
    """What `run` returns for each of `runs`, its keyword arguments by name, on one rank."""
    shard_on_the_cpu()
    if "zero" in engine:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        compile_nothing()
    results = {}
    for name, case in runs.items():
        # Every `train()` collects garbage: most of its time, if it looks through all of torch.
        gc.freeze()
        AcceleratorState._reset_state()
        GradientState._reset_state()
        results[name] = run(folder / name, engine=engine, **case)
    return results

"""One rank of a training run of test_distributed.py: `distributed_worker.py FOLDER`.

FOLDER/run.pkl holds the arguments of `run`; what it returns goes to FOLDER/<rank>.pkl.
"""

import os
import pickle
import sys
from pathlib import Path

import support
import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import Trainer

from amp_hf import AMPConfig, AMPTrainer


def run(engine, config=None, net="MLP", dtype=torch.float32, trainer=None, **kwargs):
    """`config=None` is the stock Trainer. Returns the run's batches, weights and logs."""
    model = support.make(getattr(support, net), dtype=dtype)
    recorder = support.Recorder()
    weights = []

    def keep(event, state, control):
        weights.append(whole(made.model))

    made = support.trainer_for(
        model,
        sys.argv[1],
        None if config is None else AMPConfig(**{"ascent_start": 0.0} | config),
        cls=Trainer if config is None else AMPTrainer,
        trainer={"data_collator": recorder, "callbacks": [support.on(["on_step_end"], keep)]}
        | (trainer or {}),
        **engine_arguments(engine),
        **kwargs,
    )
    made.train()
    size = made.args.gradient_accumulation_steps
    batches = recorder.batches
    return {
        "windows": [batches[i : i + size] for i in range(0, len(weights) * size, size)],
        "weights": weights,
        "logs": support.logs(made),
        "names": [name for name, _ in made.model.named_parameters()],
    }


def engine_arguments(engine):
    """Of `TrainingArguments`, on the CPU."""
    name, _, stage = engine.partition("-")
    if name == "fsdp2":
        wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["Linear"]}
        return {"fsdp": True, "fsdp_config": wrapped}
    if name == "zero":
        zero = {"stage": int(stage), "stage3_param_persistence_threshold": 100}
        auto = dict.fromkeys(
            (
                "train_micro_batch_size_per_gpu",
                "train_batch_size",
                "gradient_accumulation_steps",
                "gradient_clipping",
            ),
            "auto",
        )
        return {"deepspeed": auto | {"zero_optimization": zero}}
    return {}


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


def whole(model):
    """The parameters, gathered from all ranks."""
    return [whole_tensor(param).detach().clone() for param in model.parameters()]


def whole_tensor(param):
    if isinstance(param, DTensor):
        return param.full_tensor()
    if hasattr(param, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(param)
    return param


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    shard_on_the_cpu()
    result = run(**pickle.loads(Path(sys.argv[1], "run.pkl").read_bytes()))
    Path(sys.argv[1], f"{distributed.get_rank()}.pkl").write_bytes(pickle.dumps(result))
    distributed.destroy_process_group()

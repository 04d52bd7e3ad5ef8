"""What only a GPU can show: half precision, CUDA graphs, and FSDP as Accelerate starts it."""

import functools
import warnings

import pytest
import torch
from distributed_worker import run_all
from processes import on_ranks
from support import (
    ConvNet,
    always,
    digit_batches,
    learnt,
    logged,
    make,
    train,
    trainer_for,
    weights,
)
from torch._dynamo.utils import counters
from transformers import Trainer

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.flatness import LossSurface, measure

pytestmark = pytest.mark.gpu

plain_net = functools.partial(ConvNet, dropout=0.0)


def on_gpu(folder, **kwargs):
    return train(make(plain_net), folder, always(inner_steps=2), use_cpu=False, **kwargs)


def assert_close(actual, expected, atol):
    for name, value in weights(expected.model).items():
        torch.testing.assert_close(weights(actual.model)[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_half_precision_trains_as_full_precision_does(tmp_path, precision):
    actual, expected = on_gpu(tmp_path, **{precision: True}), on_gpu(tmp_path, tf32=False)
    assert logged(actual, "amp/delta_norm")[-4:] == pytest.approx([0.1] * 4, rel=1e-3)
    assert all(tensor.isfinite().all() for tensor in weights(actual.model).values())
    assert logged(actual, "loss")[-1] == pytest.approx(logged(expected, "loss")[-1], rel=0.1)


def test_an_overflow_in_fp16_reaches_no_weight_and_lowers_the_scale(tmp_path):
    trainer = on_gpu(tmp_path, fp16=True, max_steps=1)
    start = trainer.accelerator.scaler.get_scale()
    for param in trainer.model.parameters():  # so large that float16 overflows
        param.data.mul_(1e4)
    before = [param.clone() for param in trainer.model.parameters()]
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < start
    assert all(map(torch.equal, trainer.model.parameters(), before))


@pytest.mark.parametrize("options", [{}, {"fp16": True}], ids=["float32", "fp16"])
@pytest.mark.parametrize("reuse", [False, True])
def test_a_perturbed_step_waits_for_the_device_no_more_often_than_its_passes_do(
    tmp_path, options, reuse
):
    def waits(cls, **own):
        class Watched(cls):
            def training_step(self, *args):
                if self.state.global_step < 4:  # what is found out once a run
                    return super().training_step(*args)
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    return super().training_step(*args)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

        trainer = trainer_for(
            make(plain_net), tmp_path, cls=Watched, use_cpu=False, **own, **options
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        return sum("synchroniz" in str(warning.message) for warning in caught)

    own = dict(ascent_every=2 if reuse else 1, ascent_reuse=reuse)
    stock = waits(Trainer)
    assert waits(AMPTrainer, config=always(**own)) <= 2 * stock
    steered = waits(AMPTrainer, config=AMPConfig(**own), trainer={"callbacks": [learnt(loss=0.1)]})
    assert steered <= 2 * stock


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_equal_eager_ones_without_recompilation(tmp_path, mode):
    torch._dynamo.reset()
    counters.clear()
    compiled = on_gpu(tmp_path, torch_compile=True, torch_compile_mode=mode, max_steps=8)
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(compiled, on_gpu(tmp_path, max_steps=8), atol=1e-3)


def test_channels_last_changes_nothing_but_the_rounding(tmp_path, monkeypatch):
    # In TF32, two orders of one sum differ by as much as two trainings do. On torch 2.11,
    # `tf32=False` leaves it on in convolutions, which have a setting of their own.
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    model = make(plain_net).to(memory_format=torch.channels_last)
    actual = train(model, tmp_path, always(inner_steps=2), use_cpu=False, tf32=False)
    assert_close(actual, on_gpu(tmp_path, tf32=False), atol=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_fsdp_with_one_rank_trains_as_one_process(tmp_path, bf16):
    case = dict(net="conv", config={"inner_steps": 2, "scope": "batch"}, use_cpu=False)
    if bf16:  # under FSDP, torch refuses BatchNorm in bf16 on a GPU, with any Trainer
        case |= {"bf16": True, "net": "mlp"}
    runs = []
    for engine in ("plain", "fsdp2"):
        (rank,) = on_ranks(run_all, tmp_path / engine, engine, {"run": case}, processes=1)
        runs.append(rank["run"]["weights"])
    for expected, actual in zip(*runs, strict=True):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0, atol=2e-2 if bf16 else 1e-5)


def test_flatness_on_the_gpu_is_that_on_the_cpu():
    """Random directions are drawn on the CPU for both."""
    settings = dict(steps=3, directions=2, max_iterations=5, probes=2)
    found = []
    for device in ("cpu", "cuda"):
        model = make(ConvNet, dtype=torch.float64).to(device)
        batches = [b | {"pixels": b["pixels"].double()} for b in digit_batches(32, 16)]
        found.append(measure(LossSurface(model, batches, progress=False), **settings))
    on_cpu, on_gpu = found
    assert on_gpu.worst_case_rise == pytest.approx(on_cpu.worst_case_rise, rel=1e-6)
    assert on_gpu.random_rise.values == pytest.approx(on_cpu.random_rise.values, rel=1e-6)
    assert on_gpu.top_eigenvalue.value == pytest.approx(on_cpu.top_eigenvalue.value, rel=1e-6)
    assert on_gpu.trace.values == pytest.approx(on_cpu.trace.values, rel=1e-6)

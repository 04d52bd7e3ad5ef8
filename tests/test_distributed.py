"""Two processes of each engine, against one process that accumulates what the two see together.

That one is compared with the reference in test_trajectory.py.
"""

import functools
import pickle
import subprocess
import sys

import distributed_worker
import pytest
import torch
from support import average, amp_gradient, make, mean, mlp_loss
import reference

pytestmark = pytest.mark.distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
REPLICATED = ["ddp", "zero1", "zero2"]

JOINED = {
    "one ascent": dict(config={}),
    "accumulated": dict(
        config={"inner_steps": 2, "inner_lr": 0.3}, gradient_accumulation_steps=2, max_grad_norm=0.1
    ),
    "relative ball": dict(config={"ball": "relative"}, gradient_accumulation_steps=2),
    "tensor ball": dict(config={"ball": "tensor"}, net="partly_frozen"),
    "partly used": dict(net="partly_used", ddp={"find_unused_parameters": True}),
    "tokens": dict(net="gpt2", gradient_accumulation_steps=2),
    "checkpointing": dict(net="gpt2", activation_checkpointing=True),
    "adapters": dict(net="lora", gradient_accumulation_steps=2),
}
SEPARATE = {
    "own": dict(config={"inner_steps": 2, "inner_lr": 0.3}, gradient_accumulation_steps=2),
    "own tokens": dict(net="gpt2"),
    "own tokens, accumulated": dict(net="gpt2", gradient_accumulation_steps=2),
}
DDP = {
    "views": dict(ddp={"gradient_as_bucket_view": True}, gradient_accumulation_steps=2),
    "static graph": dict(ddp={"static_graph": True}, config={"scope": "batch"}),
    "static graph, views": dict(ddp={"static_graph": True, "gradient_as_bucket_view": True}),
    "buffers broadcast": dict(net="conv"),
    "buffers not broadcast": dict(net="conv", ddp={"broadcast_buffers": False}),
    "reentrant checkpointing": dict(
        net="gpt2",
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    ),
}


def with_scope(scope, cases):
    return {
        name: case | {"config": case.get("config", {}) | {"scope": scope}}
        for name, case in cases.items()
    }


def cases_of(engine):
    cases = with_scope("batch", JOINED)
    if engine in REPLICATED:
        cases |= with_scope("micro_batch", SEPARATE)
    if engine == "ddp":
        cases |= DDP
    return cases


@functools.cache
def expected(case):
    """The weights after every step and the logs of one process."""
    case = pickle.loads(case)
    steps = case.get("gradient_accumulation_steps", 1)
    case.pop("ddp", None)
    return distributed_worker.run("/tmp/unused", **case | {"gradient_accumulation_steps": 2 * steps})


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    @functools.cache
    def start(engine):
        folder = tmp_path_factory.mktemp(engine)
        (folder / "runs.pkl").write_bytes(pickle.dumps((engine, cases_of(engine))))
        command = [*TORCHRUN, distributed_worker.__file__, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]

    return start


@pytest.mark.parametrize(
    "engine, name", [(engine, name) for engine in ENGINES for name in cases_of(engine)]
)
def test_two_processes_train_as_one_that_sees_both_their_batches(outcomes, engine, name):
    case = cases_of(engine)[name]
    one = expected(pickle.dumps(case))
    first, second = (rank[name] for rank in outcomes(engine))
    tolerance = 2e-7 if "zero" in engine else 1e-12
    assert len(first["weights"]) == len(second["weights"]) == 3
    for mine, theirs, joined in zip(first["weights"], second["weights"], one["weights"]):
        for key, value in joined.items():
            assert torch.equal(mine[key], theirs[key]), key
            torch.testing.assert_close(mine[key].double(), value, rtol=0, atol=tolerance)
    for here, there in zip(first["logs"][:3], one["logs"][:3], strict=True):
        for key in ("loss", "grad_norm", "amp/loss", "amp/sharpness", "amp/delta_norm"):
            assert here[key] == pytest.approx(there[key], rel=1e-4, abs=1e-6), key

"""Two processes of each engine, against one process that accumulates what the two see together.

That one is compared with the reference in test_trajectory.py.
"""

import functools
import pickle
import time

import pytest
import reference
import torch
from accelerate import ParallelismConfig
from distributed_worker import run, run_all
from processes import on_ranks
from support import amp_gradient, average, make, mean, mlp_loss
from torch.multiprocessing.spawn import ProcessException
from transformers.trainer_utils import get_last_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
REPLICATED = ["ddp", "zero1", "zero2"]

# ε sets itself, and corrects itself by what the last step did.
STEERED = dict(loss=0.1, epsilon=0.05, past=[[0.05, 0.3, 0.4, 0.05]])

JOINED = {
    "one ascent": dict(config={}),
    "accumulated": dict(
        config={"inner_steps": 2, "inner_lr": 0.3}, gradient_accumulation_steps=2, max_grad_norm=0.1
    ),
    "uneven shards": dict(net="odd", config={"ball": "tensor"}),
    "evaluated in mid-step": dict(net="odd", gradient_accumulation_steps=2, eval_dataset=True),
    "tensor ball": dict(config={"ball": "tensor"}, net="partly_frozen"),
    "elementwise ball": dict(
        net="odd",
        config={"epsilon": None, "ball": "elementwise", "inner_steps": 2},
        begins=dict(loss=0.1),
    ),
    "partly used": dict(net="partly_used", ddp={"find_unused_parameters": True}),
    "tokens": dict(net="gpt2", gradient_accumulation_steps=2),
    "checkpointing": dict(net="gpt2", activation_checkpointing=True),
    "adapters": dict(net="lora", gradient_accumulation_steps=2),
    "norms only": dict(net="conv", config={"perturb": "norm"}),
    "half the batch": dict(config={"ascent_fraction": 0.5}),
    "compiled": dict(torch_compile=True, torch_compile_backend="aot_eager"),
    "steered": dict(
        config={"epsilon": None, "inner_steps": 2},
        gradient_accumulation_steps=2,
        begins=STEERED,
    ),
    "first radius": dict(net="gpt2", config={"epsilon": None}, begins=dict(loss=0.1)),
    "reused": dict(config={"ascent_every": 3, "ascent_reuse": True}, gradient_accumulation_steps=2),
}
SEPARATE = {
    "own": dict(config={"inner_steps": 2, "inner_lr": 0.3}, gradient_accumulation_steps=2),
    "own, steered": dict(config={"epsilon": None}, begins=STEERED),
    "own tokens": dict(net="gpt2"),
    "own tokens, steered": dict(
        net="gpt2", config={"epsilon": None}, gradient_accumulation_steps=2, begins=STEERED
    ),
    "own tokens, accumulated": dict(net="gpt2", gradient_accumulation_steps=2),
}
OWN_LOSS = dict(net="gpt2", gradient_accumulation_steps=2, begins=STEERED)
# Means that the Trainer adds up, where one process would have twice as many as two.
ADDED_UP = OWN_LOSS | dict(own_loss="mean", learning_rate=0.0, max_steps=8)
OFFLOADED = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}
OF_ENGINE = {
    "ddp": {
        # FSDP and ZeRO copy the parameters, so that these share nothing any more.
        "shared memory": dict(net="sharing", config={"inner_steps": 2}),
        "views": dict(ddp={"gradient_as_bucket_view": True}, gradient_accumulation_steps=2),
        "channels_last": dict(net="channels_last"),
        "static graph": dict(ddp={"static_graph": True}),
        "static graph, views": dict(ddp={"static_graph": True, "gradient_as_bucket_view": True}),
        "buffers broadcast": dict(net="conv"),
        "buffers not broadcast": dict(net="conv", ddp={"broadcast_buffers": False}),
        "reentrant checkpointing": dict(
            net="gpt2",
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        ),
        "bf16": dict(bf16=True),
        "scaled": dict(loss_scale=1024.0, gradient_accumulation_steps=2),
        "own loss": OWN_LOSS | dict(own_loss="divided"),
        "own loss, joined": OWN_LOSS | dict(own_loss="divided", config={"scope": "batch"}),
        "own loss, steered": OWN_LOSS | dict(own_loss="divided", config={"epsilon": None}),
    },
    "fsdp2": {
        "own loss": OWN_LOSS | dict(own_loss="divided", config={"epsilon": None}),
        "kept gathered after forward": dict(fsdp={"reshard_after_forward": False}),
        "bf16": dict(bf16=True, gradient_accumulation_steps=2),
        "bf16, weights too": dict(bf16=True, half_weights=True),
        "scaled": dict(loss_scale=1024.0, gradient_accumulation_steps=2),
    },
    "zero1": {
        "bf16": dict(deepspeed={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        "offloaded": dict(deepspeed=OFFLOADED),
        "bf16 gradients": dict(deepspeed={"data_types": {"grad_accum_dtype": "bf16"}}),
        "reentrant checkpointing": dict(
            net="gpt2",
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        ),
    },
    "zero2": {
        "offloaded": dict(deepspeed=OFFLOADED, gradient_accumulation_steps=2),
        "bf16": dict(deepspeed={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    },
    "zero3": {
        "offloaded": dict(deepspeed=OFFLOADED, gradient_accumulation_steps=2),
        "partly offloaded": dict(deepspeed=OFFLOADED, partly_offloaded=True),
        "parameters offloaded": dict(
            deepspeed={"zero_optimization": {"offload_param": {"device": "cpu"}}}
        ),
        "second copy": dict(deepspeed={"zero_optimization": {"zero_hpz_partition_size": 2}}),
        "reentrant checkpointing": dict(
            net="gpt2",
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": True},
        ),
        "bf16": dict(deepspeed={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    },
}
REFUSED = {
    "fsdp2": {
        "micro_batch": (dict(config={"scope": "micro_batch"}), "over all ranks, and they share"),
        "half precision": (dict(half_weights=True), "load the model with dtype=torch.float32"),
    },
    "zero2": {
        "no ZeRO": (dict(deepspeed={"zero_optimization": {"stage": 0}}), "DeepSpeed without ZeRO"),
        "bf16": (
            dict(deepspeed={"bf16": {"enabled": "auto"}}, bf16=True),
            "without bf16, pass",
        ),
        "fp16": (dict(deepspeed={"fp16": {"enabled": True}}), "without fp16, pass"),
        "fp16 autocast": (
            dict(deepspeed={"torch_autocast": {"enabled": True, "dtype": "float16"}}),
            "set its dtype to bfloat16",
        ),
    },
    "zero3": {
        "nvme": (
            dict(
                deepspeed={
                    "zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}
                }
            ),
            "set offload_param's device to cpu",
        ),
        "micro_batch": (dict(config={"scope": "micro_batch"}), "over all ranks, and they share"),
    },
}
# What three perturbed steps communicate more than three of the stock Trainer, by scope.
MORE_COLLECTIVES = {
    "ddp": {"micro_batch": {}, "batch": {"c10d.allreduce_": 3}},
    "zero1": {"micro_batch": {}, "batch": {"c10d.allreduce_": 3}},
    "zero2": {"micro_batch": {}, "batch": {"c10d.allreduce_": 3}},
    # The ascents' own passes, one of two micro-batches a step, and the norms.
    "fsdp2": {
        "batch": {
            "c10d._allgather_base_": 24,
            "c10d._reduce_scatter_base_": 12,
            "c10d.allreduce_": 3,
        }
    },
    "zero3": {
        "batch": {"c10d._allgather_base_": 6, "c10d._reduce_scatter_base_": 6, "c10d.allreduce_": 3}
    },
}
COUNTED = dict(counted=True, gradient_accumulation_steps=2, logging_steps=100)
# Of a trainer that was stopped and resumed, and of one that was not.
RESUMED = dict(
    net="dropout",
    config={"ascent_every": 2},
    optim="adamw_torch",
    learning_rate=0.01,
    lr_scheduler_type="cosine",
    gradient_accumulation_steps=2,
    max_steps=6,
)
# The same with a Δ that is reused: computed at the steps 0 and 3, after the checkpoint.
REUSED = RESUMED | dict(
    config={"ascent_every": 4, "ascent_reuse": True}, save_strategy="steps", save_steps=3
)
# Data that no number of steps or ranks divides: followed by the reference.
UNEVEN = {
    "short last batch and window": dict(
        samples=42, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=2
    ),
    "stream": dict(stream=True, samples=34, gradient_accumulation_steps=2, max_steps=5),
}


def with_scope(scope, cases):
    return {
        f"{name}, {scope}": case | {"config": case.get("config", {}) | {"scope": scope}}
        for name, case in cases.items()
    }


def compared_cases(engine):
    cases = with_scope("batch", JOINED)
    if engine in REPLICATED:
        cases |= with_scope("micro_batch", SEPARATE)
    return cases | OF_ENGINE[engine]


def uneven_cases(engine):
    scopes = ["micro_batch", "batch"] if engine in REPLICATED else ["batch"]
    return {k: v for scope in scopes for k, v in with_scope(scope, UNEVEN).items()}


def cases_of(engine):
    alone = {"first rank logs": dict(first_logs=True, logging_steps=2)}
    for scope in ("micro_batch", "batch") if engine == "ddp" else ():
        for name, epsilon in (("stock", 0), ("fixed", 0.05), ("steered", None)):
            config = {"epsilon": epsilon, "scope": scope}
            alone[f"added up, {name}, {scope}"] = ADDED_UP | {"config": config}
    resumed = {"whole": RESUMED, "resumed": RESUMED | {"cut": 3}}
    resumed |= {"whole, reused": REUSED, "resumed, reused": REUSED | {"cut": 3}}
    refused = {
        f"refused, {name}": case | {"refused": True}
        for name, (case, _) in REFUSED.get(engine, {}).items()
    }
    raising = {f"{where} raises": {"raises": where} for where in ("forward", "backward")}
    if engine == "fsdp2":
        kept = {"fsdp": {"reshard_after_forward": False}}
        raising |= {f"{name}, kept gathered": case | kept for name, case in raising.items()}
    return (
        compared_cases(engine)
        | uneven_cases(engine)
        | alone
        | resumed
        | refused
        | counted_cases(engine)
        | raising
    )


def counted_cases(engine):
    counted = {"stock": COUNTED | {"config": {"epsilon": 0}}}
    for scope in MORE_COLLECTIVES[engine]:
        counted |= with_scope(scope, {"counted": COUNTED})
    steered = COUNTED | {"begins": STEERED, "max_steps": 5}
    counted |= {"fixed": steered | {"config": {"ascent_start": 0.2}}}
    return counted | {"counted, steered": steered | {"config": {"epsilon": None}}}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The results of all cases of an engine, run in one start of two processes.

    Where that fails, it fails all tests of the engine: there is no second start.
    """

    @functools.cache
    def results_or_error(engine):
        try:
            return on_ranks(run_all, tmp_path_factory.mktemp(engine), engine, cases_of(engine))
        except (ProcessException, TimeoutError) as error:
            return str(error)

    def of(engine):
        found = results_or_error(engine)
        if isinstance(found, str):
            pytest.fail(found, pytrace=False)
        return found

    return of


@functools.cache
def alone(case):
    return run("/tmp/unused", **pickle.loads(case))


_OF_ENGINES = ("ddp", "fsdp", "deepspeed", "partly_offloaded", "loss_scale", "eval_dataset")


def expected(engine, case):
    """The results of one process."""
    case = {key: value for key, value in case.items() if key not in _OF_ENGINES}
    case["gradient_accumulation_steps"] = 2 * case.get("gradient_accumulation_steps", 1)
    if engine not in REPLICATED:  # what `scope=None` is there
        case["config"] = case.get("config", {}) | {"scope": "batch"}
    return alone(pickle.dumps(case))


@pytest.mark.parametrize(
    "engine, name", [(engine, name) for engine in ENGINES for name in compared_cases(engine)]
)
def test_two_processes_train_as_one_that_sees_both_their_batches(outcomes, engine, name):
    case = cases_of(engine)[name]
    one = expected(engine, case)
    first, second = (rank[name] for rank in outcomes(engine))
    tolerance = 2e-3 if "bf16" in name else 2e-7 if "zero" in engine else 1e-12
    assert len(first["weights"]) == len(second["weights"]) == 3
    for mine, theirs, joined in zip(first["weights"], second["weights"], one["weights"]):
        for key, value in joined.items():
            assert torch.equal(mine[key], theirs[key]), key
            torch.testing.assert_close(mine[key].double(), value.double(), rtol=0, atol=tolerance)
    relative = 3e-2 if "bf16" in name else 1e-4
    mine = [entry for entry in first["logs"] if "loss" in entry]
    for here, there in zip(mine, one["logs"][:3], strict=True):
        assert here.keys() == there.keys()
        for key in {
            "loss",
            "grad_norm",
            "amp/loss",
            "amp/sharpness",
            "amp/delta_norm",
        } & here.keys():
            # The Trainer logs the gradient as it finds it.
            scale = case.get("loss_scale", 1) if key == "grad_norm" else 1
            assert here[key] / scale == pytest.approx(there[key], rel=relative, abs=1e-6), key


@pytest.mark.parametrize("scope", ["micro_batch", "batch"])
def test_means_that_the_trainer_adds_up_are_logged_as_by_the_stock_one(outcomes, scope):
    (first, _) = outcomes("ddp")
    stock, fixed, steered = (
        [entry for entry in first[f"added up, {name}, {scope}"]["logs"] if "loss" in entry]
        for name in ("stock", "fixed", "steered")
    )
    case = ADDED_UP | {"own_loss": "divided", "config": {"epsilon": None, "scope": scope}}
    divided = [entry for entry in expected("ddp", case)["logs"] if "loss" in entry]
    assert len(stock) == 8
    for plain, perturbed, held, alone in zip(stock, fixed, steered, divided):
        assert perturbed["loss"] == held["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        rise = perturbed["amp/loss"] - perturbed["loss"]
        assert perturbed["amp/sharpness"] == pytest.approx(rise, abs=1e-3) and rise > 0
        norms = (entry.get("amp/delta_norm", 0.0) for entry in (held, alone))  # 0: a plain step
        assert next(norms) == pytest.approx(next(norms), rel=1e-3)
    assert len({entry["amp/delta_norm"] for entry in steered[2:]}) > 3  # it is corrected


def test_hybrid_shards_train_as_one_process_does(tmp_path):
    """Four processes: two replicas of two shards each."""
    case = dict(net="odd", config={"inner_steps": 2, "scope": "batch"})
    plan = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    cases = {"run": case | {"parallelism_config": plan}}
    ranks = on_ranks(run_all, tmp_path, "fsdp2", cases, processes=4)
    one = alone(pickle.dumps(case | {"gradient_accumulation_steps": 4}))["weights"]
    for rank in ranks:
        for actual, expected in zip(rank["run"]["weights"], one, strict=True):
            for key, value in expected.items():
                torch.testing.assert_close(actual[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "engine, name", [(engine, name) for engine in ENGINES for name in uneven_cases(engine)]
)
def test_short_batches_short_windows_and_streams_follow_the_reference(outcomes, engine, name):
    first, second = (rank[name] for rank in outcomes(engine))
    config = cases_of(engine)[name]["config"]
    tolerance = 2e-7 if "zero" in engine else 1e-12
    theta = [param.detach().double() for param in make().parameters()]
    assert len(first["weights"]) == len(second["weights"]) > 3
    sizes = set()
    for step, (mine, theirs) in enumerate(zip(first["weights"], second["weights"])):
        total = [torch.zeros_like(param) for param in theta]
        # A stream may end in the middle of a window, whose gradient the Trainer keeps for the next.
        for window, other in zip(first["windows"][step], second["windows"][step], strict=True):
            batches = [batch | {"pixels": batch["pixels"].double()} for batch in window + other]
            sizes.add((len(batches), *(len(batch["labels"]) for batch in batches)))
            losses = [mlp_loss(batch) for batch in batches]
            seen = mean(losses) if config["scope"] == "batch" else None
            gradient = average([amp_gradient(loss, theta, seen, epsilon=0.05) for loss in losses])
            total = [a + b for a, b in zip(total, gradient)]
        theta = reference.sgd(theta, total, 0.1)
        for (key, value), expected in zip(mine.items(), theta, strict=True):
            assert torch.equal(value, theirs[key])
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=tolerance)
    assert len(sizes) > 1
    assert max(map(len, first["windows"])) == (2 if "stream" in name else 1)


@pytest.mark.parametrize(
    "engine, scope", [(engine, scope) for engine in ENGINES for scope in MORE_COLLECTIVES[engine]]
)
def test_a_perturbed_step_communicates_no_more_than_it_must(outcomes, engine, scope):
    for rank in outcomes(engine):
        stock, counted = (rank[name]["collectives"] for name in ("stock", f"counted, {scope}"))
        assert counted - stock == MORE_COLLECTIVES[engine][scope]
        assert not stock - counted


@pytest.mark.parametrize("engine", ENGINES)
def test_a_radius_that_sets_itself_takes_one_exchange_a_step(outcomes, engine):
    for rank in outcomes(engine):
        fixed, steered = (rank[name]["collectives"] for name in ("fixed", "counted, steered"))
        assert steered - fixed == {"c10d.allreduce_": 5}
        assert not fixed - steered


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reused", ["", ", reused"])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(outcomes, engine, reused):
    for rank in outcomes(engine):
        whole, resumed = (rank[f"{run}{reused}"]["weights"] for run in ("whole", "resumed"))
        assert len(whole) == len(resumed) == 6
        for expected, actual in zip(whole, resumed):
            for key, value in expected.items():
                assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_may_log_alone(outcomes, engine):
    first, second = (rank["first rank logs"] for rank in outcomes(engine))
    entries = [entry for entry in first["logs"] if entry.get("loss") == 7.0]
    assert [sorted(entry) for entry in entries] == [["epoch", "loss", "step"]] * 3
    own, theirs = (
        [entry for entry in rank["logs"] if "loss" in entry and entry not in entries]
        for rank in (first, second)
    )
    assert own == theirs
    assert ["amp/loss" in entry for entry in own] == [True]


@pytest.mark.parametrize(
    "engine, name",
    [(engine, name) for engine in ENGINES for name in cases_of(engine) if " raises" in name],
)
def test_after_an_exception_every_rank_computes_with_theta(outcomes, engine, name):
    for rank in outcomes(engine):
        (weights, loss), (weights_after, loss_after) = rank[name]
        for key, value in weights.items():
            assert torch.equal(weights_after[key], value), key
        assert loss_after == loss


@pytest.mark.parametrize(
    "engine, name", [(engine, name) for engine, cases in REFUSED.items() for name in cases]
)
def test_what_would_not_be_exact_is_refused_in_one_line_by_the_constructor(outcomes, engine, name):
    said = REFUSED[engine][name][1]
    for rank in outcomes(engine):
        assert said in rank[f"refused, {name}"]
        assert "\n" not in rank[f"refused, {name}"]


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_killed_rank_ends_all_in_bounded_time_and_the_run_resumes(outcomes, tmp_path, engine):
    case = RESUMED | {"save_strategy": "steps", "save_steps": 2}
    start = time.monotonic()
    with pytest.raises(ProcessException, match=r"SIGKILL|closed by peer"):  # who is seen first
        on_ranks(run_all, tmp_path, engine, {"run": case | {"killed": 3}})
    assert time.monotonic() - start < 300  # the timeouts of the engines are half an hour
    assert get_last_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    resumed = on_ranks(run_all, tmp_path, engine, {"run": case | {"resume": True}})
    for rank, own in zip(outcomes(engine), resumed):
        for expected, actual in zip(
            rank["whole"]["weights"][2:], own["run"]["weights"], strict=True
        ):
            for key, value in expected.items():
                assert torch.equal(actual[key], value), key

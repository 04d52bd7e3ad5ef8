import json

import pytest
import resume_worker
from processes import in_process
from support import differing, learnt, make, on, trainer_for, weights
from torch.multiprocessing import ProcessExitedException
from transformers.trainer_utils import get_last_checkpoint

from amp_hf import AMPConfig


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "ascents"),
    [
        ("steered", [*range(4, 13)]),
        ("ascents", [4, 6, 8, 10, 12]),
        # Also after each checkpoint, which holds no Δ.
        ("reused", [4, 7, 10]),
        ("sub_batch", [4, 6, 8, 10, 12]),
    ],
)
def test_a_run_that_was_killed_and_resumed_equals_the_uninterrupted_one_to_the_bit(
    tmp_path, config, ascents
):
    folder = tmp_path / "cut"
    expected = resume_worker.run(tmp_path / "whole", "whole", config)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_process(resume_worker.run, folder, "killed", config)
    assert get_last_checkpoint(folder) == str(folder / "checkpoint-9")  # in the second epoch
    actual = in_process(resume_worker.run, folder, "resumed", config)
    for run in (expected, actual):
        assert [entry["step"] for entry in run["logs"] if "amp/loss" in entry] == ascents
        del run["logs"][-1]["train_loss"]  # a mean over the call of `train`, here of a part
    for key, value in expected.items():
        assert actual[key] == value, key


@pytest.mark.parametrize("config", resume_worker.CONFIGS)
def test_a_step_that_a_checkpoint_cuts_short_is_repeated_and_counted_once(tmp_path, config):
    def terminate(event, state, control):
        """As `enable_jit_checkpoint` does on a SIGTERM."""
        if state.global_step == step:
            trainer._save_checkpoint(trainer.model, trial=None)
            control.should_training_stop = True

    step = 6 if config == "reused" else 7  # one with an ascent
    options = dict(max_steps=12, save_strategy="steps", save_steps=3, optim="adamw_torch")
    options |= dict(gradient_accumulation_steps=2, learning_rate=0.01)
    outcomes = []
    for callbacks in ([], [on(["on_pre_optimizer_step"], terminate)]):
        own = {"callbacks": [learnt(), *callbacks]}
        folder = tmp_path / str(len(callbacks))
        trainer = trainer_for(make(), folder, resume_worker.CONFIGS[config], trainer=own, **options)
        trainer.train()
        if callbacks:
            trainer = trainer_for(make(), folder, resume_worker.CONFIGS[config], **options)
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert trainer.state.global_step == 12
        progress = trainer.state.stateful_callbacks["amp_hf"]["progress"]
        outcomes.append((weights(trainer.model), progress))
    (whole, expected), (resumed, progress) = outcomes
    assert not differing(whole, resumed)
    assert progress == expected and progress["perturbed_steps"] > 3


def test_a_checkpoint_of_a_ray_trial_holds_what_a_resumed_run_needs(tmp_path):
    def save(event, state, control):
        trainer._tune_save_checkpoint(str(tmp_path))

    own = {"callbacks": [learnt(), on(["on_step_end"], save)]}
    trainer = trainer_for(make(), tmp_path, AMPConfig(), trainer=own, max_steps=4)
    trainer.train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    kept = json.loads(path.read_text())["stateful_callbacks"]["amp_hf"]
    assert kept["progress"]["ascent_steps"] == 3
    assert kept["feedback"]["radius"]["epsilon"] > 0

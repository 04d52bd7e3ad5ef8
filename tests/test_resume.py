import pickle
import signal
import subprocess
import sys

import pytest
import resume_worker
from transformers.trainer_utils import get_last_checkpoint


def start(folder, mode, config):
    return subprocess.Popen(
        [sys.executable, resume_worker.__file__, folder, mode, config],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "ascents"),
    [
        ("steered", [6, 7, 8, 9, 10, 11, 12]),
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
    killed = start(folder, "killed", config)
    expected = resume_worker.run(tmp_path / "whole", "whole", config)
    error = killed.communicate()[1]
    assert killed.returncode == -signal.SIGKILL, error
    assert not (folder / "outcome.pkl").exists()
    assert get_last_checkpoint(folder) == str(folder / "checkpoint-9")  # in the second epoch
    resumed = start(folder, "resumed", config)
    error = resumed.communicate()[1]
    assert resumed.returncode == 0, error
    actual = pickle.loads((folder / "outcome.pkl").read_bytes())
    for run in (expected, actual):
        assert [entry["step"] for entry in run["logs"] if "amp/loss" in entry] == ascents
        del run["logs"][-1]["train_loss"]  # a mean over the call of `train`, here of a part
    for key, value in expected.items():
        assert actual[key] == value, key

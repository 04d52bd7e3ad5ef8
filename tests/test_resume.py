import pytest
import resume_worker
from processes import in_process
from torch.multiprocessing import ProcessExitedException
from transformers.trainer_utils import get_last_checkpoint


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

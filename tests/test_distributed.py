import pickle
import subprocess
import sys

import distributed_worker
import pytest
import reference
import torch
from support import amp_gradient, average, make, mlp_loss

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.distributed
@pytest.mark.parametrize("accumulation", [1, 2])
def test_under_ddp_each_rank_has_its_own_delta_and_all_ranks_the_same_weights(
    tmp_path, accumulation
):
    steps, config = 3, dict(epsilon=0.05, inner_lr=0.3, inner_steps=2)
    run = (config | {"ascent_start": 0.0}, steps, accumulation)
    (tmp_path / "run.pkl").write_bytes(pickle.dumps(run))
    command = [*TORCHRUN, distributed_worker.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    (windows, weights), (other_windows, other_weights) = (
        pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in range(2)
    )
    assert len(weights) == steps
    theta = [param.detach() for param in make(dtype=torch.float64).parameters()]
    for step in range(steps):
        for a, b in zip(weights[step], other_weights[step], strict=True):
            assert torch.equal(a, b)
        losses = [mlp_loss(batch) for batch in windows[step] + other_windows[step]]
        assert len(losses) == 2 * accumulation
        gradients = [amp_gradient(loss, theta, **config) for loss in losses]
        theta = reference.sgd(theta, average(gradients), 0.1)
        for actual, expected in zip(weights[step], theta, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert not torch.equal(windows[0][0]["pixels"], other_windows[0][0]["pixels"])

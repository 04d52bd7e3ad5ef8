"""Processes that need not import torch and transformers, which takes seconds.

They are forks of multiprocessing's fork server, which has imported them and does nothing else: it
runs no threads of torch, whose locks a fork would inherit.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import start_processes

TIMEOUT = 600  # seconds that processes may take on a machine that is busy with other things

multiprocessing.set_forkserver_preload(["amp_hf.images.classification", "peft", "sklearn.datasets"])
FORKS = multiprocessing.get_context("forkserver")


def in_process(function, *args):
    """What `function(*args)` returns in another process."""
    (result,) = _run([{}], function, args)
    return result


def on_ranks(function, *args, processes=2):
    """What `function(*args)` returns on each rank, in the environment that torchrun gives them.

    Where one fails, the others are ended, and its traceback is raised.
    """
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = dict(
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the one above
    )
    ranks = [shared | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]
    return _run(ranks, function, args)


def _run(environments, function, args):
    """Calls `function(*args)` in a process with each of `environments`."""
    end = time.monotonic() + TIMEOUT
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(index)) for index in range(len(environments))]
        started = start_processes(
            _process,
            (environments, function, args, files),
            nprocs=len(files),
            join=False,
            start_method="forkserver",
        )
        while not started.join(max(0, end - time.monotonic())):
            if time.monotonic() > end:
                for process in started.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} took more than {TIMEOUT} seconds.")
        return [pickle.loads(file.read_bytes()) for file in files]


def _process(index, environments, function, args, files):
    os.environ.update(environments[index])
    torch.set_num_threads(1)
    result = function(*args)
    files[index].write_bytes(pickle.dumps(result))
    if distributed.is_initialized():
        distributed.barrier()  # one that leaves early would fail the others
        distributed.destroy_process_group()

import gc
import os

# No test needs the network: without these, a hub client may wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The processes that tests start share the cores, and threads of theirs would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# To ask whether there is a GPU must not begin CUDA, which the forks of processes.py could not use.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads would only wait for each other


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite, or the fast part of it, runs on two processes where xdist is installed."""
    options = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not options.keyword
    looks = options.usepdb or options.capture == "no"
    is_worker = hasattr(config, "workerinput")  # which must not start further ones
    if whole and not looks and not is_worker and getattr(options, "numprocesses", 0) is None:
        options.numprocesses = 2
        options.dist = "loadscope"  # whose scopes are those below
        options.loadscopereorder = False  # but in the order below


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file on one process, and of test_distributed.py an engine: one start has all its cases."""
    from test_distributed import ENGINES
    from xdist.scheduler import LoadScopeScheduling

    class ByEngine(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            words = test.rstrip("]").partition("[")[2].split("-")
            engine = next((word for word in words if word in ENGINES), "")
            return f"{file} {engine}" if file.endswith("test_distributed.py") else file

    return ByEngine(config, log)


def pytest_collection_modifyitems(items):
    # The files that take long come first, so that no process waits for the other's last one.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    # Every `train()` collects garbage: most of its time, if it looks through all of transformers.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _environment():
    """As it was: TrainingArguments set variables, which later tests' processes would inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

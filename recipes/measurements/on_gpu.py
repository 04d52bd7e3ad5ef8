"""What has yet to be shown on a GPU: as much of it as the time allows, and the rest the next time.

    python recipes/measurements/on_gpu.py --minutes 25 --data path/to/copies

Goes through `jobs` in their order and writes into on_gpu.json what it has finished, which it then
leaves out. What the time cuts off goes on where it was: a training from its last checkpoint, the
comparison with its next run, anything else from its beginning.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from amp_hf.job.arguments import new_parser
from amp_hf.job.folder import last_checkpoint

HERE = Path(__file__).parent
LEAST = 30  # seconds, below which nothing is begun
WHOLE = 600  # seconds for what cannot go on where it was


@dataclass
class GPUArguments:
    minutes: float = field(metadata={"help": "How long it may take."})
    data: str | None = field(
        default=None,
        metadata={"help": "A folder of local copies. Default: the data sets come from the Hub."},
    )
    output: str = field(
        default=str(HERE / "on_gpu.json"), metadata={"help": "What is finished, in JSON."}
    )
    cache: str = field(
        default="outputs/on_gpu", metadata={"help": "A folder for checkpoints and logs."}
    )


FAST = "--bf16 true --dataloader_num_workers 4 --save_total_limit 1 --torch_compile true"
PREACT = f"--model preactresnet18 --from_scratch --augment objects --num_train_epochs 200 {FAST}"


def jobs(data: str | None) -> dict[str, list[str]]:
    """By name, the words after `python`. A training gets its folder and its checkpoint later."""
    recipes = HERE.parent

    def training(dataset: str, words: str) -> list[str]:
        where = ["--dataset", os.path.join(data, dataset)] if data else []
        return [str(recipes / f"train_{dataset}.py"), *where, *words.split()]

    benchmark = [str(HERE / "benchmark_step.py")]
    large = ["--workloads", "vit_small_patch16_224:224:64", "resnet50:224:64"]
    own = ["--trainers", "AMPTrainer", "AMPTrainer, reusing Δ"]
    beside = [str(HERE / "erm_comparison.py"), "--output", str(HERE / "erm_comparison_gpu.json")]
    beside += ["--tables", "recipes", "--settings", "cifar10 recipe"]
    beside += ["--data", data] if data else []
    return {
        "tests": ["-m", "pytest", str(recipes.parent / "tests"), "-m", "gpu", "-q"],
        "step, bf16": [*benchmark, *large, *own, "--bf16"],
        "step": benchmark,
        "CIFAR-10's recipe beside the alternatives": beside,
        "CIFAR-10, ERM": training("cifar10", f"{PREACT} --epsilon 0"),
        "CIFAR-10, AMP()": training("cifar10", PREACT),
        "CIFAR-10, AMP as released": training("cifar10", f"{PREACT} --ball tensor --epsilon 0.5"),
        "GTSRB, AMP()": training("gtsrb", f"--from_scratch --num_train_epochs 60 {FAST}"),
        "GTSRB, ERM": training("gtsrb", f"--from_scratch --num_train_epochs 60 {FAST} --epsilon 0"),
    }


def run(name: str, words: list[str], folder: Path, seconds: float) -> dict | None:
    """Its command and its result; `None` if it failed or the time was not enough."""
    folder.mkdir(parents=True, exist_ok=True)
    more: list[str] = []
    script = Path(words[0]).name
    if script.startswith("train_"):
        more = ["--output_dir", str(folder)]
        if last_checkpoint(str(folder)) is not None:
            more += ["--resume_from_checkpoint", "true"]
    elif script != "erm_comparison.py":
        seconds = min(seconds, WHOLE)
        if script.startswith("benchmark_"):
            more = ["--json", str(folder / "all_results.json")]
    began = time.monotonic()
    log = folder / "log.txt"
    with log.open("a") as output, _process([*words, *more], output) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"{name}: not finished; see {log}")
            return None
    if status != 0:
        print(f"{name}: failed; see {log}")
        return None
    results = folder / "all_results.json"
    said = log.read_text().strip().splitlines()
    return {
        "command": shlex.join(["python", *words]),
        "seconds": round(time.monotonic() - began),  # since it was last resumed
        "result": json.loads(results.read_text()) if results.exists() else said[-1:],
    }


@contextlib.contextmanager
def _process(words: list[str], output) -> Iterator[subprocess.Popen]:
    """With all of its children, which end with it."""
    process = subprocess.Popen(
        [sys.executable, *words], stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    try:
        parser = new_parser(GPUArguments, __doc__)
        (options,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        sys.exit(f"on_gpu.py: error: {error}")
    if not torch.cuda.is_available():
        sys.exit("on_gpu.py: error: there is no CUDA device.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes the child along
    end = time.monotonic() + 60 * options.minutes
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    device = torch.cuda.get_device_name()
    for name, words in jobs(options.data).items():
        left = end - time.monotonic()
        if name not in found and left > LEAST:
            result = run(name, words, Path(options.cache, name.replace(" ", "_")), left)
            if result is not None:
                found[name] = {"device": device, "torch": torch.__version__} | result
                path.write_text(json.dumps(found, indent=1) + "\n")
                print(f"{name}: {found[name]['result']}")
    missing = [name for name in jobs(options.data) if name not in found]
    print(f"Saved {path}. " + (f"Missing: {', '.join(missing)}." if missing else "All is done."))


if __name__ == "__main__":
    main()

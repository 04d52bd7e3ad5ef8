"""What a step costs compared with the stock Trainer's: AMP, and what else a user could install.

    python recipes/measurements/benchmark_step.py
    python recipes/measurements/benchmark_step.py --workloads vit_small_patch16_224:224:32 --bf16
    python recipes/measurements/benchmark_step.py --compile reduce-overhead --trainers AMPTrainer

Each trainer runs in its own process, as it would in use, and takes turns there with the stock one,
a cycle of optimizer steps each, for `--rounds` rounds: whatever else the machine does then affects
both. The table shows the median and the quartiles of the ratios. On a GPU, events mark the steps
and nothing waits between them. The images are random noise, prepared in advance.

    time      of a step, from the forward pass to the optimizer, over the stock Trainer's; with one
              ascent, or with Δ reused from an earlier step
    memory    peak of live tensors during the steps minus the stock one's, in parameter copies
    exact     whether the weights are restored to the bit, by construction: a copy restores them,
              a subtraction does not

The alternatives (alternatives.py) also run inside the Trainer and with the same optimizer, SGD with
Nesterov momentum. The last line compares the throughput of images that are augmented on the fly
with that of prepared ones.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
from alternatives import ALTERNATIVES, CYCLE, RADIUS, SGD, ClosureTrainer
from meters import Clock, PeakMemory, machine
from PIL import Image
from plan import check_names
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.compat import sgd_with_arguments
from amp_hf.images.augment import train_transform
from amp_hf.images.backbones import build_model, preprocessing
from amp_hf.images.data import ImageDataset, as_is
from amp_hf.job.arguments import new_parser

LABELS = [str(i) for i in range(10)]


@dataclass
class BenchmarkArguments:
    workloads: list[str] = field(
        default_factory=lambda: [
            "resnet18:32:128",  # bound by computation
            "vit_tiny_patch16_224:64:64",
            "vit_base_patch16_224:64:2",  # bound by its parameters
        ],
        metadata={"help": "model:image size:batch size, any number of them."},
    )
    rounds: int = field(default=15, metadata={"help": "Cycles of each trainer."})
    bf16: bool = field(default=False, metadata={"help": "bf16 autocast, in all trainers."})
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = field(
        default=None, metadata={"help": "Mode of torch.compile, in all trainers. Default: eager."}
    )
    trainers: list[str] = field(
        default_factory=lambda: [name for name in TRAINERS if name != STOCK],
        metadata={"help": "What to compare with the stock one, by the names in the tables."},
    )
    json: str | None = field(default=None, metadata={"help": "A file for all results."})

    def __post_init__(self) -> None:
        for workload in self.workloads:
            name, *numbers = workload.split(":")
            if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
                raise ValueError(
                    "--workloads takes model:image size:batch size, such as resnet18:32:128, not "
                    f"{workload!r}."
                )
            try:
                build_model(name, LABELS, int(numbers[0]), from_scratch=True)
            except ValueError as error:
                raise ValueError(f"--workloads {workload}: {error}") from error
        check_names("trainers", self.trainers, [name for name in TRAINERS if name != STOCK])
        if self.rounds < 2:
            raise ValueError(f"--rounds must be at least 2, got {self.rounds}.")


class Prepared(torch.utils.data.Dataset):
    """The same batch, prepared in advance, again and again."""

    def __init__(self, batch: dict[str, torch.Tensor], length: int) -> None:
        self.batch = batch
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: tensor[: len(indices)] for name, tensor in self.batch.items()}


def noise(count: int, size: int) -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=LABELS))
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [i % 10 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features)


STOCK, AUGMENTING = "stock Trainer", "stock Trainer, augmenting"
TRAINERS: dict[str, dict] = {
    STOCK: dict(cls=Trainer),
    "AMPTrainer": dict(cls=AMPTrainer, amp_config=AMPConfig(RADIUS)),
    "AMPTrainer, elementwise": dict(
        cls=AMPTrainer, amp_config=AMPConfig(RADIUS, ball="elementwise")
    ),
    "AMPTrainer, reusing Δ": dict(
        cls=AMPTrainer,
        amp_config=AMPConfig(RADIUS, ascent_every=10**9, ascent_reuse=True),
    ),
    **{name: dict(cls=ClosureTrainer, algorithm=made) for name, (made, _) in ALTERNATIVES.items()},
    AUGMENTING: dict(cls=Trainer),
}


def build(workload: str, options: BenchmarkArguments, augments: bool, cls: type, **own) -> Trainer:
    name, *sizes = workload.rsplit(":", 2)
    size, batch_size = map(int, sizes)
    torch.manual_seed(0)
    model = build_model(name, LABELS, size, from_scratch=True)
    model.to(memory_format=torch.channels_last)
    geometry, mean, std = preprocessing(model)
    count = batch_size * (CYCLE + 1)
    transform = train_transform("objects", mean, std)
    data = ImageDataset(noise(count, size), "image", "label", geometry, transform)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=CYCLE + 1,
        per_device_train_batch_size=batch_size,
        optim="sgd",
        optim_args="momentum=0.9,nesterov=true",
        learning_rate=SGD["lr"],
        weight_decay=5e-4,
        max_grad_norm=0.0,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),
        torch_compile_mode=options.compile,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    if not augments:
        data = Prepared(data.__getitems__(list(range(batch_size))), count)
    own |= sgd_with_arguments(args)
    trainer = cls(model=model, args=args, data_collator=as_is, train_dataset=data, **own)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(workload: str, options: BenchmarkArguments) -> dict:
    """One workload with every trainer."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        found = {
            key: pool.apply(beside_stock, (workload, options, key))
            for key in tqdm(options.trainers, desc=workload, unit=" trainers", disable=None)
        }
    first = next(iter(found.values()))
    stock = statistics.median(ms for each in found.values() for ms in each["stock"])
    augmenting = found.pop(AUGMENTING, None)
    return {
        "workload": workload,
        "parameters": first["parameters"],
        "stock_step_ms": stock,
        "throughput": augmenting and _quartiles([1 / ratio for ratio in augmenting["cycle"]]),
        "trainers": {
            key: {
                "time": _quartiles(each["step"]),
                "memory_copies": each["memory_copies"],
                "exact": ALTERNATIVES[key][1] if key in ALTERNATIVES else True,
            }
            for key, each in found.items()
        },
    }


def beside_stock(workload: str, options: BenchmarkArguments, key: str) -> dict:
    """The trainer `key` and the stock one take turns in this process."""
    trainers = [build(workload, options, of == AUGMENTING, **TRAINERS[of]) for of in (STOCK, key)]
    clocks = []
    for trainer in trainers:
        clocks.append(Clock())
        trainer.add_callback(clocks[-1])
        trainer.train()  # warms up

    found: dict[str, list[float]] = {"stock": [], "step": [], "cycle": []}
    for _ in range(options.rounds):
        for trainer in trainers:
            trainer.train()
        (stock, stock_cycle), (own, own_cycle) = (clock.milliseconds() for clock in clocks)
        found["stock"].append(stock)
        found["step"].append(own / stock)
        found["cycle"].append(own_cycle / stock_cycle)

    peaks = []
    for trainer in trainers:
        memory = PeakMemory()
        trainer.add_callback(memory)
        trainer.train()
        peaks.append(memory.peak)
    params = [p for p in trainers[0].model.parameters() if p.requires_grad]
    copies = (peaks[1] - peaks[0]) / sum(p.nbytes for p in params)
    return found | {"memory_copies": copies, "parameters": sum(p.numel() for p in params)}


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


def show(result: dict) -> None:
    print(
        f"\n{result['workload']}, {result['parameters'] / 1e6:.1f} million parameters; stock step "
        f"{result['stock_step_ms']:.1f} ms"
    )
    print(f"{'':28}{'time [quartiles]':>24}{'memory':>10}  exact")
    for name, row in result["trainers"].items():
        low, median, high = row["time"]
        cell = f"{median:.3f} [{low:.3f}, {high:.3f}]"
        exact = "yes" if row["exact"] else "no"
        print(f"{name:28}{cell:>24}{row['memory_copies']:>+10.3f}  {exact}")
    if result["throughput"]:
        low, median, high = result["throughput"]
        spread = f"{median:.3f} [{low:.3f}, {high:.3f}]"
        print(f"Images augmented as they are needed: {spread} of ready ones")


def main() -> None:
    parser = new_parser(BenchmarkArguments, __doc__)
    try:
        (options,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        sys.exit(f"benchmark_step.py: error: {error}")
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    results = []
    for workload in options.workloads:
        results.append(measure(workload, options))
        show(results[-1])
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(machine() | asdict(options) | {"results": results}, file, indent=2)


if __name__ == "__main__":
    main()

"""What an AMP step costs beside the stock Trainer's: time, memory and the input pipeline.

    python recipes/benchmark_step.py
    python recipes/benchmark_step.py --model vit_tiny_patch16_224 --rounds 40 --json result.json

Trainers take turns, `--chunk` optimizer steps each, `--rounds` times over, so that whatever else
the machine does falls on all of them; each ratio is that of two medians of one round, and the
table shows the ratios' median and quartiles. Images are random noise: time does not depend on them.

    amp       AMPTrainer over Trainer, N = 1, every step perturbed; without loading the batch
    pipeline  throughput with images augmented as they are needed over that on ready tensors
    memory    peak of live tensors over AMP steps less the stock one's, in copies of the parameters
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.augment import train_transform
from amp_hf.vision import ImageDataset, as_is, build_model, preprocessing


@dataclass
class BenchmarkArguments:
    model: str = "resnet18"
    image_size: int = 32
    batch_size: int = 128
    rounds: int = 15
    chunk: int = 5
    json: str | None = None


class Clock(TrainerCallback):
    """Seconds of each step, and from one step's end to the next one's."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.cycles: list[float] = []
        self._end: float | None = None

    def on_train_begin(self, *args, **kwargs):
        self._end = None

    def on_step_begin(self, *args, **kwargs):
        self._begin = _now()

    def on_step_end(self, *args, **kwargs):
        now = _now()
        if self._end is not None:  # the first step warms up
            self.steps.append(now - self._begin)
            self.cycles.append(now - self._end)
        self._end = now

    def medians(self) -> tuple[float, float]:
        """Of the steps and of the cycles since the last call."""
        medians = statistics.median(self.steps), statistics.median(self.cycles)
        self.steps, self.cycles = [], []
        return medians


class PeakMemory(TrainerCallback):
    """Bytes of live tensors at the peak of the steps, over those at the beginning of the first."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                self._before = torch.cuda.memory_allocated()
            else:
                self._profiler = torch.profiler.profile(profile_memory=True)
                self._profiler.start()

    def on_train_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated() - self._before
        else:
            self._profiler.stop()
            changes = [
                (event.start_ns(), event.nbytes())
                for event in self._profiler.profiler.kineto_results.events()
                if event.name() == "[memory]"
            ]
            self.peak = int(np.cumsum([size for _, size in sorted(changes)]).max())


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Ready(torch.utils.data.Dataset):
    """Batches that are there already."""

    def __init__(self, batch: dict[str, torch.Tensor], length: int) -> None:
        self.batch = batch
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: tensor[: len(indices)] for name, tensor in self.batch.items()}


def noise(count: int, size: int) -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)])
    )
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": [i % 10 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features)


def main() -> None:
    (options,) = HfArgumentParser(
        BenchmarkArguments, description=__doc__
    ).parse_args_into_dataclasses()
    count = options.batch_size * options.chunk
    names = [str(i) for i in range(10)]

    def trainer(cls, data=None, **kwargs):
        torch.manual_seed(0)
        try:
            model = build_model(options.model, names, options.image_size, from_scratch=True)
        except ValueError as error:
            sys.exit(f"benchmark_step.py: error: {error}")
        model.to(memory_format=torch.channels_last)
        geometry, mean, std = preprocessing(model)
        if data is None:
            rows = noise(count, options.image_size)
            transform = train_transform("objects", mean, std)
            data = ImageDataset(rows, "image", "label", geometry, transform)
        args = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=options.chunk,
            per_device_train_batch_size=options.batch_size,
            optim="sgd",
            optim_args="momentum=0.9,nesterov=true",
            learning_rate=0.01,
            weight_decay=5e-4,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        )
        return cls(model=model, args=args, data_collator=as_is, train_dataset=data, **kwargs)

    stock = trainer(Trainer)
    ready = stock.train_dataset.__getitems__(list(range(options.batch_size)))
    trainers = {
        "stock": stock,
        "amp": trainer(AMPTrainer, amp_config=AMPConfig(ascent_start=0.0)),
        "ready": trainer(Trainer, Ready(ready, count)),
    }
    peaks, clocks = {}, {}
    for name, contestant in trainers.items():
        memory, clocks[name] = PeakMemory(), Clock()
        contestant.add_callback(memory)
        contestant.train()
        peaks[name] = memory.peak
        contestant.remove_callback(memory)
        contestant.add_callback(clocks[name])

    ratios: dict[str, list[float]] = {"amp": [], "pipeline": []}
    stock_ms = []
    for _ in range(options.rounds):
        medians = {}
        for name, contestant in trainers.items():
            contestant.train()
            medians[name] = clocks[name].medians()
        ratios["amp"].append(medians["amp"][0] / medians["stock"][0])
        ratios["pipeline"].append(medians["ready"][1] / medians["stock"][1])
        stock_ms.append(medians["stock"][0] * 1000)

    params = [p for p in stock.model.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in params)
    result = {
        "model": options.model,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "stock_step_ms": statistics.median(stock_ms),
        **{name: statistics.quantiles(values, n=4) for name, values in ratios.items()},
        "memory_copies": (peaks["amp"] - peaks["stock"]) / size,
        "largest_copies": max(p.nbytes for p in params) / size,
    }
    print(_TABLE.format(**result))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


_TABLE = """
{model}, {image_size} px, batch {batch_size}, {device}, {threads} threads, torch {torch}
stock step {stock_step_ms:.1f} ms; {rounds} rounds; median [quartiles]

amp       {amp[1]:.3f} [{amp[0]:.3f}, {amp[2]:.3f}] times the stock step
pipeline  {pipeline[1]:.3f} [{pipeline[0]:.3f}, {pipeline[2]:.3f}] times ready tensors' throughput
memory    {memory_copies:.3f} copies of the parameters (the largest tensor: {largest_copies:.3f})"""


if __name__ == "__main__":
    main()

"""ERM and AMP side by side on real handwritten digits: no download, a few minutes on a CPU.

    python recipes/train_digits.py
    python recipes/train_digits.py --seeds 10 --epsilon 0.2

scikit-learn's 1,797 digits of 8x8 pixels, of which a small network sees 200 and is tested on the
rest: few enough to overfit, which is what a regularizer is for. Prints test accuracy, negative
log-likelihood, expected calibration error and the worst rise of the training loss that is found
within 0.1 of the weights, as mean ± standard deviation over seeds, and draws the loss around the
last seed's weights.
"""

import json
import os
import statistics
import sys
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageClassification,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.compat import sgd_with_arguments
from amp_hf.flatness import LossSurface
from amp_hf.images.augment import eval_transform
from amp_hf.images.backbones import build_model, preprocessing
from amp_hf.images.data import ImageDataset, as_is
from amp_hf.job.arguments import new_parser
from amp_hf.metrics import compute_metrics
from amp_hf.pictures import draw_loss_curves, loss_curves, save

MODEL = "test_resnet"  # timm's smallest ResNet, 0.4 million parameters
BATCH_SIZE = 32
IMAGE_SIZE = 24  # upscaled from 8: the network's stem divides the side by four
RADIUS = 0.1  # of `worst_rise`, whatever epsilon is
COLUMNS = ("accuracy", "nll", "ece", "worst_rise")


@dataclass
class DigitsArguments:
    seeds: int = field(default=5, metadata={"help": "How many runs of each, with seeds from 0 on."})
    train_samples: int = field(default=200, metadata={"help": "Digits to train on, 10 to 1,787."})
    epochs: int = field(default=40, metadata={"help": "How often each of them is seen."})
    output_dir: str = field(
        default="outputs/digits", metadata={"help": "A folder for the results and the picture."}
    )
    budget: float | None = field(
        default=None,
        metadata={"help": "Times the stock Trainer's passes, > 1: AMPConfig.for_budget."},
    )

    def __post_init__(self) -> None:
        for name, least, most in (
            ("seeds", 1, 1000),
            ("train_samples", 10, 1787),
            ("epochs", 1, 1000),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"--{name} must be an integer in [{least}, {most}].")
        if self.train_samples % BATCH_SIZE == 1:
            raise ValueError(
                f"--train_samples {self.train_samples} leaves one image for the last batch, too "
                "few for BatchNorm: take one more or one less."
            )


def digits() -> datasets.Dataset:
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)])
    )
    rows = {"image": [Image.fromarray(p) for p in pixels], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features)


def train(options: DigitsArguments, amp_config: AMPConfig, seed: int, folder: str):
    """One run: its trainer, the loss around its weights, its results on the images left out."""
    rows = digits().train_test_split(
        train_size=options.train_samples, stratify_by_column="label", seed=seed
    )
    set_seed(seed)
    model = build_model(MODEL, rows["train"].features["label"].names, IMAGE_SIZE, True)
    geometry, mean, std = preprocessing(model)
    train_set, test_set = (
        ImageDataset(rows[split], "image", "label", geometry, eval_transform(mean, std))
        for split in ("train", "test")
    )
    args = TrainingArguments(
        output_dir=folder,
        seed=seed,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=256,
        optim="sgd",
        optim_args="momentum=0.9,nesterov=true",
        learning_rate=0.05,
        weight_decay=5e-4,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        logging_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = AMPTrainer(
        model=model,
        args=args,
        amp_config=amp_config,
        data_collator=as_is,
        train_dataset=train_set,
        compute_metrics=compute_metrics,
        **sgd_with_arguments(args),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    results = trainer.evaluate(test_set, metric_key_prefix="test")
    surface = LossSurface.of(trainer, progress=False)
    results["test_worst_rise"] = surface.worst_case_rise(RADIUS, steps=5)
    return trainer, surface, {name: results[f"test_{name}"] for name in COLUMNS}


def compare(options: DigitsArguments, amp_config: AMPConfig) -> None:
    os.makedirs(options.output_dir, exist_ok=True)
    variants = {"ERM": replace(amp_config, epsilon=0.0), "AMP": amp_config}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    surfaces: dict[str, LossSurface] = {}
    with tqdm(total=options.seeds * len(variants), unit=" runs", disable=None) as progress:
        for seed in range(options.seeds):
            for name, config in variants.items():
                progress.set_description(f"{name}, seed {seed}")
                folder = os.path.join(options.output_dir, name.lower())
                trainer, surfaces[name], metrics = train(options, config, seed, folder)
                results[name].append(metrics)
                progress.update()

    defaults = AMPConfig().to_dict()
    chosen = {k: v for k, v in amp_config.to_dict().items() if v != defaults[k]}
    shown = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
    print(
        f"\n{options.train_samples} training images, n = {options.seeds} seeds, AMP by "
        f"AMPConfig({shown})"
    )
    print(" " * 5 + "".join(f"{column:>20}" for column in COLUMNS))
    for name, runs in results.items():
        cells = (_mean_and_spread([run[column] for run in runs]) for column in COLUMNS)
        print(f"{name:5}" + "".join(f"{cell:>20}" for cell in cells))

    trainer.save_model()
    path = os.path.join(options.output_dir, "all_results.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=2)
    device = trainer.args.device
    reloaded = AutoModelForImageClassification.from_pretrained(folder).eval().to(device)
    images = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    with torch.no_grad():
        same = torch.allclose(reloaded(images).logits, trainer.model.eval()(images).logits)
    print(f"\nSaved {folder} (the last seed's AMP model) and {path}. It loads without amp_hf:")
    print(f"    AutoModelForImageClassification.from_pretrained({folder!r})")
    print(f"Reloaded, it predicts the same: {same}")
    numbers = loss_curves(surfaces, RADIUS)
    picture = os.path.join(options.output_dir, "loss_curves.png")
    print(f"ERM against AMP: {save(draw_loss_curves(numbers), numbers, picture)}")


def main() -> None:
    parser = new_parser((DigitsArguments, AMPConfig), __doc__)
    disable_progress_bar()  # of saving and loading
    try:
        budget = parser.parse_known_args()[0].budget
        if budget is not None:
            parser.set_defaults(**AMPConfig.for_budget(budget).to_dict())
        compare(*parser.parse_args_into_dataclasses())
    except (ValueError, OSError) as error:
        sys.exit(f"train_digits.py: error: {error}")


def _mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


if __name__ == "__main__":
    main()

"""Which rule should set the perturbation's radius? A screening of many, in a plain training loop.

    python recipes/measurements/rules.py --data path/to   # makes the runs that are missing
    python recipes/measurements/rules.py --table held     # prints what there is

A line of rules_plan.txt is `split | seeds | cells | rule`: split is `held` (a fifth of the training
set) or `test` (the official test set), cells are names below, `*` for all twelve or `small *` for
their stand-ins, and a rule is `erm` or `key=value` pairs, the fields of `Rule`. Runs are made in
the plan's order and added to rules.jsonl, a line each; what is there is not run again. Several
processes may share the plan and the file. rules.md says what was found.
"""

import argparse
import dataclasses
import io
import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "amp_hf"))
from augment import train_transform  # not from the package: transformers loads slowly


@dataclasses.dataclass(frozen=True)
class Cell:
    data: str
    model: str
    samples: int
    epochs: int
    augment: str = "none"
    batch: int = 128
    size: int = 32

    @property
    def vit(self) -> bool:
        return self.model.endswith("vit")

    def network(self, classes: int) -> nn.Module:
        """timm's, or one of the same kind with fewer layers."""
        if self.model == "cnn":
            widths = (3, 16, 32, 64, 64)
            layers: list[nn.Module] = []
            for narrow, wide in itertools.pairwise(widths):
                conv = nn.Conv2d(
                    narrow, wide, 3, stride=1 if narrow == 64 else 2, padding=1, bias=False
                )
                layers += [conv, nn.BatchNorm2d(wide), nn.ReLU()]
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
            return nn.Sequential(*layers, *head)
        sized = dict(img_size=self.size, patch_size=8) if self.vit else {}
        depth = dict(depth=2) if self.model == "vit" else {}
        name = "test_vit" if self.vit else self.model
        return timm.create_model(name, num_classes=classes, **sized, **depth)


CELLS = {
    "gtsrb resnet": Cell("gtsrb", "test_resnet", 2000, 60),
    "cifar resnet": Cell("cifar10", "test_resnet", 2000, 60, "objects"),
    "gtsrb vit": Cell("gtsrb", "test_vit", 1000, 120),
    "cifar vit": Cell("cifar10", "test_vit", 2000, 60),
    "digits resnet": Cell("digits", "test_resnet", 200, 60, batch=32),
    "digits vit": Cell("digits", "test_vit", 200, 60, batch=32),
    "gtsrb resnet short": Cell("gtsrb", "test_resnet", 10000, 5, "signs"),
    "cifar resnet short": Cell("cifar10", "test_resnet", 10000, 5, "objects"),
    "gtsrb vit short": Cell("gtsrb", "test_vit", 10000, 5, "signs"),
    "cifar vit short": Cell("cifar10", "test_vit", 10000, 5, "objects"),
    "digits resnet short": Cell("digits", "test_resnet", 1000, 3, batch=32),
    "digits vit short": Cell("digits", "test_vit", 1000, 3, batch=32),
}
# Stand-ins with smaller networks, images and sets, of which a dozen take a few minutes.
SMALL = {
    "gtsrb resnet": Cell("gtsrb", "cnn", 1000, 50, batch=64, size=16),
    "cifar resnet": Cell("cifar10", "cnn", 1000, 50, "objects", batch=64, size=16),
    "gtsrb vit": Cell("gtsrb", "vit", 700, 80, batch=64, size=16),
    "cifar vit": Cell("cifar10", "vit", 1000, 50, batch=64, size=16),
    "digits resnet": Cell("digits", "cnn", 200, 60, batch=32, size=16),
    "digits vit": Cell("digits", "vit", 200, 60, batch=32, size=16),
    "gtsrb resnet short": Cell("gtsrb", "cnn", 5000, 5, "signs", batch=64, size=16),
    "cifar resnet short": Cell("cifar10", "cnn", 5000, 5, "objects", batch=64, size=16),
    "gtsrb vit short": Cell("gtsrb", "vit", 5000, 5, "signs", batch=64, size=16),
    "cifar vit short": Cell("cifar10", "vit", 5000, 5, "objects", batch=64, size=16),
    "digits resnet short": Cell("digits", "cnn", 1000, 3, batch=32, size=16),
    "digits vit short": Cell("digits", "vit", 1000, 3, batch=32, size=16),
}
CELLS |= {f"small {name}": cell for name, cell in SMALL.items()}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Δ = s·T²g, with ‖T⁻¹Δ‖ the radius ρ.

    Args:
        geometry: T is 1 (`ball`) or |θ| + c (`element`).
        control: `epsilon`: ρ = min(value, ‖Tg‖), the paper's. `first`: ρ = target/‖Tg‖. `steer`: ρ
            is multiplied by (target/rise)^gain after each ascent. `correct`: ρ = k·target/‖Tg‖, and
            k is steered.
        value: ε, or the target in nats before its gate.
        gate: what the target is multiplied by, with u = 1 − (EMA of the clean loss)/L0. `share`:
            u^p. `repeat`: u^(p/epochs so far). `horizon`: u^(p/epochs in all).
        l0: `classes`: log C; `first`: the mean of the first steps' losses.
    """

    geometry: str = "ball"
    c: float = 0.01
    control: str = "steer"
    value: float = 0.1
    gain: float = 0.2
    gate: str = "none"
    p: float = 2.0
    l0: str = "classes"
    beta: float = 0.95
    start: float = 0.0
    every: int = 1
    relative: float = 0.0  # if > 0, the target is multiplied by loss/(loss + relative)
    cap: float = 0.0  # if > 0, the share of the rise that curvature may add to ρ·‖Tg‖
    bend: float = 0.0  # if > 0, the same of the rise of log loss over ρ·‖Tg‖/loss
    least: float = 0.0  # a step whose gate is below this is plain

    @classmethod
    def parse(cls, text: str) -> "Rule":
        kinds = {field.name: field.type for field in dataclasses.fields(cls)}
        pairs = dict(word.split("=") for word in text.split())
        return cls(**{key: kinds[key](value) for key, value in pairs.items()})

    def __str__(self) -> str:
        if self == ERM:
            return "erm"
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return " ".join(changed) or "value=0.1"


ERM = Rule(control="epsilon", value=0.0)


# --- data -----------------------------------------------------------------------------------------


def load(name: str, root: Path, cache: Path) -> dict[str, np.ndarray]:
    """uint8 images (n, 3, 32, 32) and labels of the train and the test split."""
    path = cache / f"{name}.npz"
    if not path.exists():
        import datasets
        from PIL import Image

        if name == "digits":
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from train_digits import digits

            splits = digits().train_test_split(train_size=1000, stratify_by_column="label", seed=0)
        else:
            splits = datasets.load_dataset(str(root / name))
        arrays = {}
        for split in ("train", "test"):
            rows = splits[split]
            column = "img" if "img" in rows.features else "image"
            rows = (
                rows.cast_column(column, datasets.Image(decode=False)) if name != "digits" else rows
            )
            pixels = []
            for item in rows[column]:
                image = Image.open(io.BytesIO(item["bytes"])) if isinstance(item, dict) else item
                image = image.convert("RGB")
                if image.size != (32, 32):
                    image = image.resize((32, 32), Image.BICUBIC)
                pixels.append(np.asarray(image).transpose(2, 0, 1))
            arrays[f"{split}_x"] = np.stack(pixels)
            arrays[f"{split}_y"] = np.array(rows["label"][:])
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **arrays)
        part.replace(path)
    with np.load(path) as file:
        return dict(file)


def split_data(cell: Cell, split: str, seed: int, arrays: dict) -> tuple[torch.Tensor, ...]:
    x, y = arrays["train_x"], arrays["train_y"]
    if split == "test":
        test_x, test_y = arrays["test_x"], arrays["test_y"]
    else:
        rng = np.random.default_rng([seed, 5])
        held = np.zeros(len(y), bool)
        for label in np.unique(y):
            (where,) = np.nonzero(y == label)
            held[rng.permutation(where)[: round(len(where) / 5)]] = True
        test_x, test_y = x[held], y[held]
        x, y = x[~held], y[~held]
    chosen = np.random.default_rng(seed).permutation(len(y))[: cell.samples]
    if len(chosen) % cell.batch == 1:
        chosen = chosen[:-1]
    if cell.size < 32 and split == "held":
        few = np.random.default_rng(0).permutation(len(test_y))[:5000]
        test_x, test_y = test_x[few], test_y[few]
    tensors = list(map(torch.from_numpy, (x[chosen], y[chosen], test_x, test_y)))
    for i in (0, 2) if cell.size < 32 else ():
        pooled = F.avg_pool2d(tensors[i].float(), 32 // cell.size)
        tensors[i] = pooled.round().to(torch.uint8)
    return tuple(tensors)


# --- the rule -------------------------------------------------------------------------------------


class Radius:
    """The state of a rule, and the step's target and radius."""

    def __init__(self, rule: Rule, classes: int) -> None:
        self.rule = rule
        self.l0 = math.log(classes) if rule.l0 == "classes" else None
        self.first: list[float] = []
        self.ema: float | None = None
        self.log_state: float | None = None  # log ρ under `steer`, log k under `correct`

    def see(self, loss: float) -> None:
        if self.rule.l0 == "first" and len(self.first) < 5:
            self.first.append(loss)
            self.l0 = statistics.mean(self.first)
        beta = self.rule.beta
        self.ema = loss if self.ema is None else beta * self.ema + (1 - beta) * loss

    def gate(self, epoch: float, epochs: int) -> float:
        """Known before the step."""
        if self.rule.gate == "none":
            return 1.0
        if self.ema is None or self.l0 is None:
            return 0.0
        learnt = min(1.0, max(0.0, 1 - self.ema / self.l0))
        per = {"share": 1.0, "repeat": max(epoch, 1e-9), "horizon": epochs}[self.rule.gate]
        return learnt ** (self.rule.p / per)

    def radius(self, target: float, norm: float) -> float:
        rule = self.rule
        if norm == 0 or target <= 0:
            return 0.0
        if rule.control == "epsilon":
            return min(target, norm)
        guess = target / norm
        if rule.control == "first":
            return guess
        if rule.control == "steer":
            if self.log_state is None:
                self.log_state = math.log(guess)
            return math.exp(self.log_state)
        if self.log_state is None:
            self.log_state = 0.0
        return guess * math.exp(self.log_state)

    def learn(self, target: float, rise: float, linear: float, loss: float) -> None:
        """`linear` is the rise of first order, ρ·‖Tg‖."""
        if self.rule.control in ("steer", "correct") and self.log_state is not None and target > 0:
            ratio = target / max(rise, target / 4) if math.isfinite(rise) else 0.25
            if self.rule.cap > 0 and linear > 0:
                ratio = min(ratio, self.rule.cap / max(rise / linear - 1, self.rule.cap / 4))
            if self.rule.bend > 0 and min(linear, loss, loss + rise) > 0:
                excess = math.log1p(rise / loss) / (linear / loss) - 1
                ratio = min(ratio, self.rule.bend / max(excess, self.rule.bend / 4))
            self.log_state += self.rule.gain * math.log(max(ratio, 0.25))


def scaled(rule: Rule, params: list[torch.Tensor], grads: list[torch.Tensor]):
    """T²g, and ‖Tg‖."""
    if rule.geometry == "ball":
        return grads, norm_of(grads)
    lengths = torch._foreach_abs(params)
    once = [g * (t + rule.c) for g, t in zip(grads, lengths)]
    norm = norm_of(once)
    return [g * (t + rule.c) for g, t in zip(once, lengths)], norm


def norm_of(tensors) -> float:
    return float(torch.stack(torch._foreach_norm(tensors)).norm())


def dot(a, b) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b)))


# --- training -------------------------------------------------------------------------------------


def train(  # noqa: PLR0912, PLR0915
    cell: Cell, rule: Rule, split: str, seed: int, arrays: dict
) -> dict:
    x, y, test_x, test_y = split_data(cell, split, seed, arrays)
    classes = int(arrays["train_y"].max()) + 1
    torch.manual_seed(seed)
    model = cell.network(classes)
    if not cell.vit:
        model = model.to(memory_format=torch.channels_last)
    mean, std = [0.5] * 3, [0.5] * 3
    augment = train_transform(cell.augment, mean, std)
    if cell.augment == "objects":
        augment.transforms[0].padding = cell.size // 8
    plain = train_transform("none", mean, std)
    named = dict(model.named_parameters())
    normalized = {
        f"{name}.{p}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for p, _ in module.named_parameters()
    }
    undecayed = [n for n in named if "bias" in n or n in normalized or ".norm." in f".{n}."]
    decay = 0.05 if cell.vit else 5e-4
    groups = [
        dict(params=[p for n, p in named.items() if n not in undecayed], weight_decay=decay),
        dict(params=[p for n, p in named.items() if n in undecayed], weight_decay=0.0),
    ]
    rate = 0.001 if cell.vit else 0.1
    if cell.vit:
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)
    params = list(named.values())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]

    per_epoch = math.ceil(len(y) / cell.batch)
    total = per_epoch * cell.epochs
    warmup = math.ceil(0.05 * total)
    radius = Radius(rule, classes)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed + 1000)
    first_perturbed = math.floor(rule.start * total)
    trace = []
    reusable = None
    ascents = 0
    began = time.process_time()
    model.train()
    step = 0
    for _ in range(cell.epochs):
        for indices in torch.randperm(len(y), generator=order).split(cell.batch):
            if step < warmup:
                factor = step / max(1, warmup)
            else:
                factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            images, labels = augment(x[indices]), y[indices]
            if not cell.vit:
                images = images.contiguous(memory_format=torch.channels_last)
            progress, epoch = step / total, step / per_epoch
            on = rule.value > 0 and step >= first_perturbed
            ascends = on and (step - first_perturbed) % rule.every == 0
            before = radius.gate(epoch, cell.epochs)
            if on and rule.gate != "none" and before < max(rule.least, 1e-6):
                ascends, reusable = False, None
            entry = None
            if on and not ascends and reusable is not None:  # Δ of an earlier step
                with torch.no_grad():
                    originals = [p.clone() for p in params]
                    torch._foreach_add_(params, reusable)
                F.cross_entropy(model(images), labels).backward()
                with torch.no_grad():
                    torch._foreach_copy_(params, originals)
            else:
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                clean = loss.item()
                if ascends:
                    ascents += 1
                    gate = before
                    target = rule.value * gate
                    if rule.relative > 0:
                        level = radius.ema or clean
                        target *= level / (level + rule.relative)
                    grads = [p.grad for p in params]
                    with torch.no_grad():
                        direction, norm = scaled(rule, params, grads)
                        rho = radius.radius(target, norm)
                        size = rho / norm if norm > 0 and math.isfinite(norm) else 0.0
                        delta = torch._foreach_mul(direction, size)
                        originals = [p.clone() for p in params]
                        torch._foreach_add_(params, delta)
                    for p in params:
                        p.grad = None
                    for m in norms:
                        m.momentum = 0.0
                    perturbed = F.cross_entropy(model(images), labels)
                    perturbed.backward()
                    for m, momentum in zip(norms, momenta):
                        m.momentum = momentum
                    with torch.no_grad():
                        torch._foreach_copy_(params, originals)
                    rise = perturbed.item() - clean
                    entry = [clean, rise, rho, norm, gate, norm_of(delta)]
                    if step % 4 == 0:
                        new = [p.grad for p in params]
                        lengths = norm_of(grads) * norm_of(new)
                        entry += [dot(grads, new) / lengths if lengths else 0.0]
                        entry += [norm_of(new) / max(1e-30, norm_of(grads))]
                    radius.learn(target, rise, rho * norm, clean)
                    reusable = delta if rule.every > 1 else None
                elif step % 4 == 0:
                    entry = [clean, 0.0, 0.0, norm_of([p.grad for p in params]), 0.0, 0.0]
                radius.see(clean)
            if entry is not None:
                if step % 4 == 0 and step:
                    grads = [p.grad for p in params]
                    key = "exp_avg" if cell.vit else "momentum_buffer"
                    old = [optimizer.state[p][key] for p in params]
                    lengths = norm_of(grads) * norm_of(old)
                    entry = entry + [math.nan] * (8 - len(entry))
                    entry += [dot(grads, old) / lengths if lengths else 0.0]
                entry = entry + [math.nan] * (9 - len(entry))
                trace.append([progress, *entry])
            if cell.vit:
                nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
    seconds = time.process_time() - began
    model.eval()
    with torch.no_grad():
        logits = [model(plain(part)) for part in test_x.split(256)]
        kept = torch.randperm(len(y))[:2000].split(256)
        fitted = sum(
            float(F.cross_entropy(model(plain(x[i])), y[i], reduction="sum")) for i in kept
        )
    result = scores(torch.cat(logits).double(), test_y)
    result["train_nll"] = fitted / min(2000, len(y))
    result["seconds"] = seconds
    result["ascents"] = round(ascents / total, 3)
    result["trace"] = summary(trace)
    return result


def scores(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    probs = logits.softmax(1)
    confidence, predicted = probs.max(1)
    correct = (predicted == labels).double()
    bins = (confidence * 15).ceil().long().sub(1).clamp(0, 14)
    gap = torch.zeros(15, dtype=torch.double).index_add_(0, bins, confidence - correct)
    return {
        "accuracy": float(correct.mean()),
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": float(gap.abs().sum() / len(labels)),
    }


TRACED = ["loss", "rise", "radius", "norm", "gate", "delta", "cosine", "ratio", "momentum_cosine"]


def summary(trace: list[list[float]]) -> dict:
    """By tenths of the schedule: medians."""
    result = {}
    if not trace:
        return result
    rows = np.array(trace)
    tenth = np.minimum(9, (rows[:, 0] * 10).astype(int))
    for i, name in enumerate(TRACED, 1):
        values = []
        for t in range(10):
            column = rows[tenth == t, i]
            column = column[np.isfinite(column)]
            values.append(float(f"{np.median(column):.3g}") if len(column) else None)
        if any(values):
            result[name] = values
    return result


# --- the plan -------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def read_plan(path: Path):
    for text in path.read_text().splitlines():
        line = text.split("#")[0].strip()
        if line:
            split, seeds, cells, rule = (part.strip() for part in line.split("|"))
            rule = ERM if rule == "erm" else Rule.parse(rule)
            names = []
            for name in map(str.strip, cells.split(",")):
                prefix, star, _ = name.partition("*")
                known = [*SMALL] if not prefix else [f"small {key}" for key in SMALL]
                names += known if star else [name]
            for name in names:
                for seed in seeds.split():
                    yield split, int(seed), name, rule


def fill(options) -> None:
    started = Path(__file__).stat().st_mtime
    arrays: dict[str, dict] = {}
    locks = options.cache / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    while True:
        done = {(r["split"], r["seed"], r["cell"], r["rule"]) for r in read_results(options.output)}
        for split, seed, name, rule in read_plan(options.plan):
            job = (split, seed, name, str(rule))
            if job in done:
                continue
            lock = FileLock(locks / ("_".join(map(str, job)).replace("/", "-") + ".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                if job in {
                    (r["split"], r["seed"], r["cell"], r["rule"])
                    for r in read_results(options.output)
                }:
                    continue
                data = CELLS[name].data
                if data not in arrays:
                    arrays[data] = load(data, options.data, options.cache)
                result = train(CELLS[name], rule, split, seed, arrays[data])
                line = dict(zip(("split", "seed", "cell", "rule"), job)) | {
                    key: float(f"{v:.6g}") if isinstance(v, float) else v
                    for key, v in result.items()
                }
                with FileLock(f"{options.output}.lock"), options.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    time.strftime("%H:%M:%S"),
                    *job,
                    f"{result['accuracy']:.4f}",
                    f"{result['nll']:.4f}",
                    f"{result['seconds']:.0f}s",
                    flush=True,
                )
            finally:
                lock.release()
            break
        else:
            if not options.wait:
                return
            time.sleep(20)
        if Path(__file__).stat().st_mtime != started:
            os.execv(sys.executable, [sys.executable, *sys.argv])


def table(options) -> None:
    """Differences to ERM of the same seed."""
    runs = {}
    for r in read_results(options.output):
        if r["split"] == options.table:
            runs.setdefault((r["cell"], r["rule"]), {})[r["seed"]] = r
    rules = list(dict.fromkeys(rule for _, rule in runs))
    for cell in CELLS:
        erm = runs.get((cell, "erm"), {})
        if not erm:
            continue
        print(f"\n{cell}")
        for rule in rules:
            mine = runs.get((cell, rule), {})
            seeds = sorted(set(mine) & set(erm)) if rule != "erm" else sorted(erm)
            if not seeds:
                continue
            parts = []
            for key, scale, digits in (("accuracy", 100, 1), ("nll", 1, 3), ("ece", 1, 3)):
                values = [
                    scale * (mine[s][key] - (erm[s][key] if rule != "erm" else 0)) for s in seeds
                ]
                spread = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                sign = "" if rule == "erm" else "+"
                parts.append(f"{statistics.mean(values):{sign}.{digits}f}{spread}")
            ascents = statistics.mean(mine[s]["ascents"] for s in seeds)
            fit = statistics.mean(mine[s]["train_nll"] for s in seeds)
            print(
                f"  {parts[0]:>10} {parts[1]:>14} {parts[2]:>14} n={len(seeds)} "
                f"asc={ascents:.2f} fit={fit:.3f}  {rule}"
            )


def main() -> None:
    here = Path(__file__)
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/amp_hf_rules"))
    parser.add_argument("--plan", type=Path, default=here.with_name("rules_plan.txt"))
    parser.add_argument("--output", type=Path, default=here.with_suffix(".jsonl"))
    parser.add_argument("--wait", action="store_true", help="for further lines of the plan")
    parser.add_argument("--table", choices=("held", "test"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.cache.mkdir(parents=True, exist_ok=True)
    table(options) if options.table else fill(options)


if __name__ == "__main__":
    main()

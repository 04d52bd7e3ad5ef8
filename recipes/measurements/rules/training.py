"""A plain training loop with AMP by a rule, for one process, as fast as small networks allow."""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from cells import Cell, split_data
from rule import Radius, Rule, dot, norm_of, scaled
from torch import nn

from amp_hf.images.augment import train_transform


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
                    target = rule.value * gate / (1 + rule.soften * max(0.0, radius.excess))
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

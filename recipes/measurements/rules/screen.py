"""Which rule should set the perturbation's radius? A screening of many, in a plain training loop.

    python recipes/measurements/rules/screen.py --data path/to   # makes the runs that are missing
    python recipes/measurements/rules/screen.py --table held     # prints what there is

A line of plan.txt is `split | seeds | cells | rule`: split is `held` (a fifth of the training
set) or `test` (the official test set), cells are names in cells.py, `*` for all twelve or
`small *` for their stand-ins, and a rule is `erm` or `key=value` pairs, the fields of `Rule`. Runs
are made in the plan's order and added to runs.jsonl, a line each; what is there is not run again.
Several processes may share the plan and the file. README.md says what was found.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from cells import CELLS, SMALL, load
from filelock import FileLock, Timeout
from rule import ERM, Rule
from training import train


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
    parser.add_argument("--plan", type=Path, default=here.with_name("plan.txt"))
    parser.add_argument("--output", type=Path, default=here.with_name("runs.jsonl"))
    parser.add_argument("--wait", action="store_true", help="for further lines of the plan")
    parser.add_argument("--table", choices=("held", "test"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    options.cache.mkdir(parents=True, exist_ok=True)
    table(options) if options.table else fill(options)


if __name__ == "__main__":
    main()

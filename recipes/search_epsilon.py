"""Searches for ε with Optuna, by the likelihood of a held-out fifth of the training set.

    python recipes/search_epsilon.py --model resnet18 --from_scratch --trials 12
    python recipes/search_epsilon.py --recipe gtsrb --from_scratch
    python recipes/search_epsilon.py --lowest 0.1 --highest 2 --budget 1.15 --dataset path/to/folder

Further arguments are those of the recipe. The stock Trainer (ε = 0), `AMPConfig()`, whose ε sets
itself, and then every trial train on the same images from the same initial weights; the test set is
not used. Without `--budget`, a trial takes twice the stock Trainer's passes: 12 of them take about
27 times as long as one training without AMP. Prints the command that trains with the best ε.
"""

import copy
import dataclasses
import math
import shlex
import sys
from dataclasses import dataclass, field
from typing import Literal

import optuna
import train_cifar10
import train_gtsrb
from transformers import PrinterCallback

from amp_hf.images.arguments import parse
from amp_hf.images.classification import ImageJob
from amp_hf.job.arguments import new_parser

RECIPES = {"cifar10": train_cifar10, "gtsrb": train_gtsrb}


@dataclass
class SearchArguments:
    recipe: Literal["cifar10", "gtsrb"] = field(
        default="cifar10", metadata={"help": "Whose defaults hold."}
    )
    trials: int = field(default=12, metadata={"help": "Trainings to try."})
    lowest: float = field(default=0.02, metadata={"help": "The smallest ε that is tried."})
    highest: float = field(default=1.0, metadata={"help": "The largest ε that is tried."})

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"--trials must be at least 1, got {self.trials}.")
        if not 0 < self.lowest < self.highest < math.inf:
            raise ValueError(
                "--lowest must be above 0 and below --highest, and --highest finite, got "
                f"{self.lowest}, {self.highest}."
            )


DEFAULTS = dict(
    output_dir="outputs/search",
    validation_fraction=0.2,
    save_strategy="no",
    logging_strategy="no",
)


def main() -> None:
    try:
        parser = new_parser(SearchArguments, __doc__)
        search, rest = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        recipe = RECIPES[search.recipe]
        defaults = recipe.DEFAULTS | DEFAULTS
        images, args, amp_config = parse(defaults, recipe.FROM_SCRATCH_DEFAULTS, None, rest)
        if not images.validation_fraction:
            raise ValueError(
                "--validation_fraction must be above 0: the search compares on held-out images."
            )
        if amp_config.epsilon is not None:
            raise ValueError("--epsilon is what is searched for: leave it out.")
        if args.eval_strategy != "no":
            raise ValueError("--eval_strategy must be no: the search evaluates by itself.")
        for name in ("push_to_hub", "hub_token", "resume_from_checkpoint"):
            if getattr(args, name):
                raise ValueError(f"--{name} is for the training that follows: leave it out here.")
        trainer = ImageJob(images, args, amp_config).trainer
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"search_epsilon.py: error: {error}")
    trainer.remove_callback(PrinterCallback)
    initial = copy.deepcopy(trainer.model)
    trainer.model_init = lambda trial: copy.deepcopy(initial)

    def space(trial: optuna.Trial) -> dict[str, float]:
        return {"epsilon": trial.suggest_float("epsilon", search.lowest, search.highest, log=True)}

    def objective(metrics: dict[str, float]) -> float:
        if trainer.is_world_process_zero():
            print(
                f"{_named(trainer.amp_config.epsilon)}: held-out accuracy "
                f"{metrics['eval_accuracy']:.4f}, NLL {metrics['eval_nll']:.4f}"
            )
        return metrics["eval_nll"]

    nll_of: dict[float | None, float] = {}
    for epsilon in (0, None):
        trainer.amp_config = dataclasses.replace(amp_config, epsilon=epsilon)
        trainer.train()
        nll_of[epsilon] = objective(trainer.evaluate())
    try:
        best = trainer.hyperparameter_search(
            space,
            objective,
            n_trials=search.trials,
            direction="minimize",
            backend="optuna",
            sampler=optuna.samplers.TPESampler(seed=args.seed),
        )
    except ValueError as error:  # Optuna's, where every trial diverged
        if not any(map(math.isfinite, nll_of.values())):
            sys.exit(f"search_epsilon.py: error: {error}")
        print(f"search_epsilon.py: of the trials: {error}", file=sys.stderr)
        best = None
    if best is not None:  # the main process
        nll_of[best.hyperparameters["epsilon"]] = best.objective
    if trainer.is_world_process_zero():
        found, nll = min(
            ((epsilon, nll) for epsilon, nll in nll_of.items() if math.isfinite(nll)),
            key=lambda pair: pair[1],
        )
        command = ["python", f"recipes/{recipe.__name__}.py", *rest]
        if found is not None:
            command += ["--epsilon", f"{found:.4g}"]
        print(f"\nBest: {_named(found)} (held-out NLL {nll:.4f})\n\n    {shlex.join(command)}")


def _named(epsilon: float | None) -> str:
    return "epsilon that sets itself" if epsilon is None else f"epsilon {epsilon:.4g}"


if __name__ == "__main__":
    main()

"""The output folder: what an earlier run left there, and which checkpoint a run goes on from."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

_RESULTS = (
    "*_results.json",
    "flatness.json",
    "loss_curves.*",
    "loss_contours.*",
    "reliability.*",
)
# Adapters that lie beside a whole model are loaded on top of it, the Trainer asks the card that is
# there for the library, and all of it would be pushed with the next model.
OF_A_RUN = (
    "checkpoint-*",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "adapter_model*.safetensors",
    "config.json",
    "adapter_config.json",
    "models.py",
    "README.md",
    "trainer_state.json",
    *_RESULTS,
)


def baseline_folder(args: TrainingArguments) -> str:
    """The ERM baseline's. It is never pushed: pushes leave out what begins with an underscore."""
    return os.path.join(str(args.output_dir), "_erm")


def last_checkpoint(folder: str) -> str | None:
    """The last one that was saved: a run may have been killed while it saved another."""
    last = max(_checkpoints(folder), key=_step, default=None)
    return None if last is None else str(last)


def _checkpoints(folder: str) -> list[Path]:
    """Those that the main process has finished."""
    found = Path(folder).glob("checkpoint-*/trainer_state.json")  # the last file that it writes
    return [path.parent for path in found if _step(path.parent) >= 0]


def _step(checkpoint: Path) -> int:
    """The number in its name, or −1."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def starts_afresh(args: TrainingArguments) -> bool:
    """Whether what lies in the output folder is an earlier run's, and not that of this one."""
    checkpoint = args.resume_from_checkpoint
    return checkpoint is None or Path(str(args.output_dir)).resolve() not in _parents(checkpoint)


def _parents(checkpoint: str) -> tuple[Path, Path]:
    """The folder that a checkpoint is in: by its name, and where links lead to."""
    return Path(os.path.abspath(checkpoint)).parent.resolve(), Path(checkpoint).resolve().parent


class EarlierRun(TrainerCallback):
    """Sets aside what would mix with the run, once the Trainer has accepted all of its arguments.

    Attributes:
        steps: how many of this run's steps an earlier one had taken; `None` before the training.
    """

    steps: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        if self.steps is None:  # a smaller batch size begins anew
            self.steps = state.global_step
            if args.should_save:
                set_aside(args, state)


def set_aside(args: TrainingArguments, state: TrainerState) -> None:
    """All that an earlier run left, or what is of steps that this run takes again or goes beyond.

    It stays in the folder `_earlier`, until something else is set aside. The ERM baseline is
    deleted. Where a run has taken its last step, all stays: the rest may yet be measured.

    Args:
        state: with the step that the training goes on from.
    """
    folder = Path(str(args.output_dir))
    if starts_afresh(args):
        shutil.rmtree(baseline_folder(args), ignore_errors=True)
        found = [path for pattern in OF_A_RUN for path in folder.glob(pattern)]
        what = "An earlier run's model and checkpoints are"
        if not any(path.is_dir() or path.suffix == ".safetensors" for path in found):
            return
    else:
        found = [path for path in _checkpoints(str(folder)) if _step(path) > state.global_step]
        if not found and state.global_step >= state.max_steps:
            return
        shutil.rmtree(baseline_folder(args), ignore_errors=True)
        found += [path for pattern in _RESULTS for path in folder.glob(pattern)]
        what = f"The checkpoints after step {state.global_step} and the results are"
        if not found:
            return
    earlier = folder / "_earlier"
    shutil.rmtree(earlier, ignore_errors=True)
    earlier.mkdir()
    for path in found:
        path.rename(earlier / path.name)
    print(f"{what} now in {earlier}.")


def check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--output_dir {folder!r} cannot be written to: {error}") from error


def check_model(model: str, output_dir: str) -> None:
    """The ERM baseline, and a resumed run, must find it as it was when the training began.

    A folder that has yet to be made counts: from then on, the name would mean what it holds.
    """
    if _is_of_a_run(Path(model).resolve(), Path(output_dir).resolve()):
        raise ValueError(
            f"--model {model!r} is, or lies in, --output_dir, whose models and checkpoints this "
            "run overwrites or moves: choose another --output_dir."
        )


def _is_of_a_run(folder: Path, output: Path) -> bool:
    """Whether a run into `output` overwrites, moves or deletes `folder`. Both are resolved."""
    return folder == output or (
        output in folder.parents
        and folder.relative_to(output).parts[0].startswith(("checkpoint-", "_"))
    )


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The folder that `--resume_from_checkpoint`, a path or `true`, means."""
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        found = last_checkpoint(str(args.output_dir))
    else:
        found = wanted if os.path.isdir(wanted) else None
    if found is None:
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: no checkpoint there (--output_dir is "
            f"{args.output_dir!r})."
        )
    if not _can_go_on(Path(found)):
        inside = last_checkpoint(found)
        raise ValueError(
            f"--resume_from_checkpoint {wanted}: no run can go on from {found!r}, which lacks the "
            "state of the Trainer or of the optimizer"
            + (f": the last checkpoint in it is {inside!r}." if inside else ".")
        )
    output = Path(str(args.output_dir)).resolve()
    if output not in _parents(found) and _is_of_a_run(Path(found).resolve(), output):
        raise ValueError(
            f"--resume_from_checkpoint {wanted} is, or lies in, a folder that this run replaces: "
            f"move it into {args.output_dir!r} itself, or choose another --output_dir."
        )
    return found


def _can_go_on(checkpoint: Path) -> bool:
    """Whether it is whole. A run's own folder is not, nor what `--save_only_model` saved."""
    optimizer = (*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*"))  # DeepSpeed's
    return bool(optimizer) and (checkpoint / "trainer_state.json").exists()

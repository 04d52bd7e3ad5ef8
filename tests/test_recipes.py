import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import search_epsilon
import torch
import torch.distributed.run
import train_cifar10
import train_digits
import train_gtsrb
from accelerate.commands.launch import launch_command, launch_command_parser
from huggingface_hub import ModelCard
from images import parquet_folder, rows
from PIL import Image
from processes import on_ranks
from recipe_worker import run_recipe
from scripts import RECIPES, error_of, main_of, run_here
from support import differing, needs_schedule_free
from transformers import AutoModelForImageClassification, TrainerState, TrainingArguments

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.compat import computes_in_bf16
from amp_hf.images import data as image_data
from amp_hf.images import tracks
from amp_hf.images.arguments import ImageArguments, parse
from amp_hf.images.augment import eval_transform
from amp_hf.images.backbones import preprocessing
from amp_hf.images.classification import ImageJob, main
from amp_hf.job import comparison
from amp_hf.job import folder as output_folder
from amp_hf.job import job as amp_job
from amp_hf.job.data import NUMBER, _divided
from amp_hf.record import TrainingRecord
from amp_hf.text.arguments import TextArguments

GTSRB = RECIPES.parents[1] / "shared" / "data" / "gtsrb"
CONFIGS = sorted((RECIPES / "accelerate").iterdir())
SMALL = "--model test_resnet --from_scratch --image_size 24 --use_cpu --num_train_epochs 2"


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = parquet_folder(tmp_path_factory.mktemp("digits"))
    datasets.load_dataset(folder)  # shows progress the first time
    return folder


@pytest.mark.slow
def test_the_digits_recipe_prints_its_table_and_saves_a_model_that_reloads(
    tmp_path, monkeypatch, capsys
):
    words = [
        "--seeds=2",
        "--epochs=2",
        "--train_samples=20",
        "--epsilon=0.1",
        f"--output_dir={tmp_path}",
    ]
    run_here(RECIPES / "train_digits.py", monkeypatch, *words)
    out = capsys.readouterr().out
    assert "20 training images, n = 2 seeds" in out
    assert "Reloaded, it predicts the same: True" in out
    table = {line.split()[0]: line for line in out.splitlines() if "±" in line}
    saved = results(tmp_path)
    for name in ("ERM", "AMP"):
        assert [run.keys() for run in saved[name]] == [{"accuracy", "nll", "ece", "worst_rise"}] * 2
        mean = sum(run["accuracy"] for run in saved[name]) / 2
        assert f" {mean:.4f} ± " in table[name]
    assert saved["ERM"] != saved["AMP"]
    assert f"ERM against AMP: {tmp_path / 'loss_curves.png'}" in out
    assert Image.open(tmp_path / "loss_curves.png").width > 1000
    assert list(json.loads((tmp_path / "loss_curves.json").read_text())["models"]) == ["ERM", "AMP"]
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "amp").config.num_labels == 10


@pytest.mark.slow
def test_a_recipe_trains_tests_saves_and_says_how_to_load(tmp_path, data, monkeypatch, capsys):
    folder = tmp_path / 'Ann\'s "flat" model'
    words = [*SMALL.split(), "--dataset", data, "--output_dir", folder]
    words += ["--validation_fraction=0.25", "--epsilon=0.2", "--max_eval_samples=50"]
    run_here(RECIPES / "train_cifar10.py", monkeypatch, *words)
    found = results(folder)
    for split in ("eval", "test"):
        assert {f"{split}_{name}" for name in ("accuracy", "nll", "ece")} <= found.keys()
    assert found["epoch"] == 2.0
    assert AMPConfig.from_json_file(folder / "amp_config.json").epsilon == 0.2
    assert (
        rf'''pipeline("image-classification", model="{tmp_path}/Ann's \"flat\" model")'''
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_options_of_the_training_loader_leave_the_results_of_every_split_alone(
    tmp_path, data, monkeypatch
):
    words = [*SMALL.split(), "--dataset", data, "--validation_fraction=0.25", "--eval_splits=train"]
    words += ["--per_device_train_batch_size=8", "--epsilon=0", "--output_dir"]  # 15 whole batches
    run_here(RECIPES / "train_cifar10.py", monkeypatch, *words, tmp_path / "plain")
    loader = ["--dataloader_num_workers=1", "--dataloader_persistent_workers=true"]
    loader += ["--dataloader_drop_last=true"]
    run_here(RECIPES / "train_cifar10.py", monkeypatch, *words, tmp_path / "out", *loader)
    plain, found = results(tmp_path / "plain"), results(tmp_path / "out")
    metrics = [f"{split}_{name}" for split in ("eval", "test", "train") for name in ("nll", "ece")]
    assert [found[name] for name in metrics] == [plain[name] for name in metrics]
    assert len({found[name] for name in metrics}) == 6
    saved = json.loads((tmp_path / "out" / "train_results.json").read_text())
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    ended = next(log for log in logged if "total_flos" in log)
    assert saved["train_loss"] == ended["train_loss"] and saved["train_nll"] == found["train_nll"]

    for folder in (tmp_path / "out", tmp_path / "out" / "_erm"):  # of an earlier run
        (folder / "checkpoint-999").mkdir(parents=True)
    again = [word for word in words if "eval_splits" not in word and "fraction" not in word]
    run_here(RECIPES / "train_cifar10.py", monkeypatch, *again, tmp_path / "out", "--max_steps=1")
    assert {name.partition("_")[0] for name in results(tmp_path / "out")} == {
        "train",
        "test",
        "epoch",
        "total",
    }
    assert not (tmp_path / "out" / "_erm").exists()
    assert not (tmp_path / "out" / "checkpoint-999").exists()
    assert (tmp_path / "out" / "_earlier" / "checkpoint-999").exists()


@needs_schedule_free
def test_what_is_saved_is_what_was_evaluated_also_with_a_schedule_free_optimizer(tmp_path, data):
    words = ["--dataset", data, "--epsilon=0", "--learning_rate=0.1", "--bf16=false"]
    words += ["--optim=schedule_free_sgd", "--lr_scheduler_type=constant"]
    found = main(argv=[*SMALL.split(), *words, f"--output_dir={tmp_path}"])
    again = [*words, "--use_cpu", "--image_size=24", f"--model={tmp_path}"]
    job = ImageJob(*parse(argv=[*again, f"--output_dir={tmp_path / 'again'}"]))
    saved = job.trainer.evaluate(job.tests["test"], metric_key_prefix="test")
    assert saved["test_nll"] == found["test_nll"]


def test_a_model_that_the_run_would_overwrite_is_refused(tmp_path, data, capsys):
    output = f"--output_dir={tmp_path}"
    main(argv=[*SMALL.split(), "--dataset", data, output, "--save_strategy=epoch"])
    for model in (tmp_path, *tmp_path.glob("checkpoint-*")):
        weights = (model / "model.safetensors").read_bytes()
        code, line = failure(capsys, "--dataset", data, output, f"--model={model}")
        assert code == 2 and "is, or lies in, --output_dir" in line and str(model) in line
        assert (model / "model.safetensors").read_bytes() == weights
    assert model != tmp_path


def test_an_output_folder_with_the_name_of_the_model_is_refused_and_not_made(
    tmp_path, data, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, line = failure(capsys, "--dataset", data, "--output_dir=test_resnet")
    assert code == 2 and "choose another --output_dir" in line
    assert not (tmp_path / "test_resnet").exists()


def test_a_run_that_goes_on_from_another_folder_does_not_mix_with_what_was_in_its_own(
    tmp_path, data, capsys
):
    words = ["--dataset", data, "--save_strategy=epoch"]
    main(argv=[*SMALL.split(), *words, f"--output_dir={tmp_path / 'other'}"])
    checkpoint = min((tmp_path / "other").glob("checkpoint-*"))
    for folder in (tmp_path / "out", tmp_path / "out" / "_erm"):  # of an earlier run
        (folder / "checkpoint-999").mkdir(parents=True)
    words += [f"--output_dir={tmp_path / 'out'}", "--resume_from_checkpoint"]
    main(argv=[*SMALL.split(), *words, str(checkpoint)])
    assert not (tmp_path / "out" / "_erm").exists()
    earlier = tmp_path / "out" / "_earlier" / "checkpoint-999"
    assert earlier.exists() and len(list((tmp_path / "other").glob("checkpoint-*"))) == 2
    shutil.copytree(checkpoint, earlier, dirs_exist_ok=True)
    code, line = failure(capsys, *words, str(earlier))
    assert code == 2 and "is, or lies in, a folder that this run replaces: move it" in line
    assert earlier.exists()
    code, line = failure(capsys, *words, str(tmp_path / "out"))
    assert code == 2 and "no run can go on from" in line
    assert f"the last checkpoint in it is '{tmp_path / 'out' / 'checkpoint-4'}'" in line


def test_a_checkpoint_may_be_a_link_or_be_linked_to(tmp_path, monkeypatch):
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    for folder in (out / "checkpoint-5", scratch / "run7"):
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").touch()
    (out / "checkpoint-10").symlink_to(scratch / "run7")
    assert output_folder.last_checkpoint(str(out)) == str(out / "checkpoint-10")
    (tmp_path / "best").symlink_to(out / "checkpoint-5")
    monkeypatch.chdir(out / "checkpoint-5")
    for wanted in (out / "checkpoint-10", f"{out}/checkpoint-5/", tmp_path / "best", "."):
        args = TrainingArguments(str(out), resume_from_checkpoint=str(wanted), use_cpu=True)
        assert not output_folder.starts_afresh(args)
    for wanted in (None, str(scratch / "run7")):
        args = TrainingArguments(str(out), resume_from_checkpoint=wanted, use_cpu=True)
        assert output_folder.starts_afresh(args)


def test_only_what_a_run_writes_is_set_aside(tmp_path):
    (tmp_path / "_earlier").mkdir()
    (tmp_path / "_earlier" / "model.safetensors").touch()
    for name in ("my_base.safetensors", "README.md", "config.json", "eval_results.json"):
        (tmp_path / name).touch()
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    output_folder.set_aside(args, TrainerState(max_steps=40))
    assert not (tmp_path / "_earlier" / "README.md").exists()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    output_folder.set_aside(args, TrainerState(max_steps=40))
    moved = {path.name for path in (tmp_path / "_earlier").iterdir()}
    own = {"README.md", "config.json", "eval_results.json"}
    assert moved == {"model-00001-of-00002.safetensors", *own}
    assert (tmp_path / "my_base.safetensors").exists()


def test_a_run_that_takes_steps_again_or_more_of_them_moves_what_is_no_longer_its_own(tmp_path):
    for step in (10, 20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-40").mkdir()  # half of one
    own = {"all_results.json", "flatness.json", "reliability.png", "_erm"}
    rest = {"checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-40", "config.json"}

    def left(step, max_steps):
        for name in own - {"_erm"}:
            (tmp_path / name).touch()
        (tmp_path / "_erm").mkdir(exist_ok=True)
        (tmp_path / "config.json").touch()
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        args = TrainingArguments(str(tmp_path), resume_from_checkpoint=checkpoint, use_cpu=True)
        output_folder.set_aside(args, TrainerState(global_step=step, max_steps=max_steps))
        return {path.name for path in tmp_path.iterdir()} - {"_earlier"}

    assert left(30, 30) == own | rest  # it was killed after its last step
    assert left(30, 60) == rest
    assert left(10, 10) == rest - {"checkpoint-20", "checkpoint-30"}
    moved = {path.name for path in (tmp_path / "_earlier").iterdir()}
    assert moved == own - {"_erm"} | {"checkpoint-20", "checkpoint-30"}


def test_a_run_that_was_killed_after_its_last_step_takes_no_other(tmp_path, data):
    words = [*SMALL.split(), "--dataset", data, f"--output_dir={tmp_path}"]
    words += ["--save_strategy=steps", "--save_steps=3", "--max_steps=3"]
    words += ["--learning_rate=0.1", "--lr_scheduler_type=constant"]
    found = main(argv=words)
    trained = (tmp_path / "model.safetensors").read_bytes()
    again = main(argv=[*words, "--resume_from_checkpoint=true"])
    assert (tmp_path / "model.safetensors").read_bytes() == trained
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3"}
    for name in ("train_loss", "train_runtime", "test_nll"):
        assert again[name] == results(tmp_path)[name] == found[name]


def test_what_the_trainer_refuses_late_leaves_an_earlier_run_where_it_was(tmp_path, data, capsys):
    words = ["--dataset", data, f"--output_dir={tmp_path}"]
    main(argv=[*SMALL.split(), *words, "--max_steps=1", "--save_strategy=steps", "--save_steps=1"])
    code, line = failure(capsys, *words, "--optim=adamw_torch", "--optim_args=nonsense")
    assert code == 2 and ": error: " in line
    # Neither is a checkpoint, though the first has a state and weights.
    (tmp_path / "empty").mkdir()
    for wanted, said in ((tmp_path, "the last checkpoint in it is"), (tmp_path / "empty", "lacks")):
        words = ["--dataset", data, f"--output_dir={tmp_path / 'out'}"]
        code, line = failure(capsys, *words, f"--resume_from_checkpoint={wanted}")
        assert code == 2 and "no run can go on from" in line and said in line
    assert not (tmp_path / "_earlier").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "checkpoint-1", "README.md"} <= left


def test_the_best_likelihood_is_the_lowest_and_defaults_are_those_of_the_optimizer(tmp_path):
    def args(*words):
        return parse(argv=[*words, f"--output_dir={tmp_path}"])[1]

    for metric, greater in (("nll", False), ("eval_ece", False), ("accuracy", True)):
        assert args(f"--metric_for_best_model={metric}").greater_is_better is greater
    given = args("--metric_for_best_model=nll", "--greater_is_better=true")
    assert given.greater_is_better
    assert (args().optim_args, args().warmup_steps) == ("momentum=0.9,nesterov=true", 0.05)
    other = args("--optim=adamw_torch")
    assert (other.optim_args, other.warmup_steps) == (None, 0.05)
    assert args("--optim=schedule_free_sgd").warmup_steps == 0


def test_a_schedule_free_optimizer_does_not_warm_up_for_a_share_of_the_steps(
    tmp_path, data, capsys
):
    words = ["--dataset", data, f"--output_dir={tmp_path}", "--optim=schedule_free_adamw"]
    code, line = failure(capsys, *words, "--warmup_steps=0.1")
    assert code == 2 and "--warmup_steps must be a whole number with a schedule-free" in line


def test_less_than_a_batch_for_each_process_cannot_drop_the_last_one(tmp_path, data, capsys):
    words = [f"--dataset={data}", f"--output_dir={tmp_path}", "--max_train_samples=7"]
    words += ["--per_device_train_batch_size=8", "--dataloader_drop_last=true"]
    code, line = failure(capsys, *words)
    assert code == 2 and "leaves nothing to train on: 7 rows are less than 1 x 8" in line


def test_a_split_that_would_pass_for_the_validation_is_refused(tmp_path, capsys):
    folder = tmp_path / "set"
    parquet_folder(folder)
    rows(240, 280).to_parquet(folder / "data" / "eval-00000-of-00001.parquet")
    argv = ["--dataset", str(folder), "--output_dir", str(tmp_path / "out")]
    argv += ["--validation_fraction=0.25", "--eval_splits=eval"]
    assert "--eval_splits: a split 'eval' would take the place" in failure(capsys, *argv)[1]


@pytest.mark.slow
def test_the_baseline_has_the_batch_size_that_the_training_came_to(tmp_path, data):
    words = [*SMALL.split(), "--dataset", data, "--output_dir", str(tmp_path)]
    job = ImageJob(*parse({}, {}, None, [*words, "--auto_find_batch_size=true"]))
    trainer = job.trainer
    calls = itertools.count()

    def run_out_of_memory(*_):
        if next(calls) == 0:
            raise RuntimeError("CUDA out of memory.")

    with trainer.model.register_forward_pre_hook(run_out_of_memory):
        trainer.train()
    found = trainer.state.train_batch_size
    assert found < trainer.args.train_batch_size
    erm = comparison.train_baseline(job, {})
    assert erm.state.max_steps == trainer.state.max_steps == 2 * math.ceil(160 / found)
    assert TrainingRecord.of(trainer, trainer.amp_config).arguments["train_batch_size"] == found


@pytest.mark.slow
def test_a_recipe_proves_on_the_card_what_the_perturbation_gained(tmp_path, monkeypatch, capsys):
    """The ERM baseline, the flatness, further splits and pictures, each of a real run."""
    folder = tmp_path / "data"
    parquet_folder(folder, train=16, test=40)
    rows(200, 240).to_parquet(folder / "data" / "contrast-00000-of-00001.parquet")
    words = [*SMALL.split(), "--dataset", folder, "--output_dir", tmp_path / "out"]
    words += ["--epsilon=0.1", "--compare_erm", "--flatness"]
    words += ["--eval_splits", "contrast", "--license=mit"]
    run_here(RECIPES / "train_gtsrb.py", monkeypatch, *words)
    assert "README.md (its card)" in capsys.readouterr().out
    folder = tmp_path / "out"
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert "More information needed" not in card.text
    nll = "test: negative log-likelihood, nats"
    for row in ("test: accuracy", nll, f"{nll}, after temperature scaling", "contrast: accuracy"):
        (line,) = [line for line in card.text.splitlines() if line.startswith(f"| {row} |")]
        assert re.fullmatch(r"\| [^|]+ \| [\d.%]+ \| [\d.%]+ \|", line)
    assert "trace of the Hessian" in card.text
    assert "2 of 2 steps had an ascent" in card.text
    for name in re.findall(r"\]\((\w+\.png)\)", card.text):
        assert Image.open(folder / name).width > 500
        assert json.loads((folder / name).with_suffix(".json").read_text())["models"].keys() == {
            "ERM",
            "AMP",
        }
    assert card.text.count(".png)") == 3
    assert card.data.pipeline_tag == "image-classification"
    assert (card.data.license, card.data.datasets) == ("mit", None)  # a folder is no Hub id
    assert "trained on `data (local)` with Adversarial Model Perturbation" in card.text
    assert str(tmp_path) not in str(card.data.to_dict())
    by_split = {result.dataset_split for result in card.data.eval_results}
    assert by_split == {"test", "contrast"}
    flatness = json.loads((folder / "flatness.json").read_text())
    assert flatness["AMP"]["samples"] == 16
    for name, path in (("AMP", folder), ("ERM", folder / "_erm")):  # of the images as they are
        model = AutoModelForImageClassification.from_pretrained(path).eval()
        geometry, mean, std = preprocessing(model)
        plain = image_data.ImageDataset(
            rows(0, 16), "img", "label", geometry, eval_transform(mean, std)
        )
        with torch.no_grad():
            loss = model(**plain.__getitems__(list(range(16)))).loss.item()
        assert flatness[name]["loss"] == pytest.approx(loss, rel=1e-4)
    # The baseline is what the stock Trainer trains from the same seed, and stays off the Hub.
    stock = [*SMALL.split(), "--dataset", tmp_path / "data", "--epsilon=0"]
    run_here(RECIPES / "train_gtsrb.py", monkeypatch, *stock, "--output_dir", tmp_path / "stock")
    baseline, expected = (
        AutoModelForImageClassification.from_pretrained(path).state_dict()
        for path in (folder / "_erm", tmp_path / "stock")
    )
    assert differing(baseline, expected) == []


def test_pictures_without_matplotlib_are_refused_before_the_training(
    tmp_path, data, capsys, monkeypatch
):
    monkeypatch.setattr(amp_job, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(argv=[*SMALL.split(), f"--dataset={data}", f"--output_dir={tmp_path}",
                            "--flatness"])  # fmt: skip
    assert "draw pictures: pip install matplotlib." in capsys.readouterr().err


def torchrun(args):
    """What `accelerate launch` calls, but with forks instead of commands."""
    words = args.training_script, *args.training_script_args
    on_ranks(run_recipe, dict(os.environ), *words, processes=int(args.nproc_per_node))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_accelerate_config_starts_a_recipe_that_saves_a_model(
    tmp_path, data, monkeypatch, config
):
    is_a_command = config.stem == "ddp"
    recipe = [RECIPES / "train_gtsrb.py"]
    if config.suffix == ".json":
        recipe += ["--deepspeed", config]
        config = config.with_name("ddp.yaml")
    if config.stem == "zero3":  # where a model that is loaded is sharded, too
        recipe += ["--flatness"]
    words = ["--config_file", config, *recipe, *SMALL.split(), "--dataset", data]
    words += ["--per_device_train_batch_size=8", "--max_train_samples=16", "--epsilon=0.1"]
    words = list(map(str, [*words, "--logging_steps=1", "--output_dir", tmp_path]))
    if is_a_command:
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        subprocess.run(command + words, check=True)
    else:
        monkeypatch.setattr(torch.distributed.run, "run", torchrun)
        launch_command(launch_command_parser().parse_args(words))
    if config.stem == "zero3":
        assert json.loads((tmp_path / "flatness.json").read_text())["AMP"]["samples"] == 16
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 32 // (8 if config.stem == "single" else 16)
    norms = [entry["amp/delta_norm"] for entry in state["log_history"][:-1]]
    assert norms == pytest.approx([0.1] * state["global_step"], rel=1e-6)
    assert all(entry["amp/sharpness"] != 0 for entry in state["log_history"][:-1])
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert results(tmp_path)["test_nll"] > 0


def test_a_yaml_file_sets_arguments_and_the_command_line_overrides_them(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("epsilon: 0.3\nmodel: vit_tiny_patch16_224\nfrom_scratch: true\n"
                      "learning_rate: 1e-3\nbf16: false\nscope: null\n")  # fmt: skip
    argv = [str(config), "--model", "resnet34", "--output_dir", str(tmp_path)]
    own = {"model": "resnet34", "weight_decay": 0.1}
    images, args, amp = parse({"learning_rate": 0.5, "seed": 7}, own, None, argv)
    assert (images.model, images.from_scratch, amp.epsilon) == ("resnet34", True, 0.3)
    assert (args.learning_rate, args.seed, args.weight_decay) == (1e-3, 7, 0.1)


def test_yaml_has_its_own_no_empty_lists_and_numbers_below_zero(tmp_path):
    config = tmp_path / "run.yaml"
    lines = ["eval_strategy: no", "logging_strategy: no", "report_to: []"]
    lines += ["eval_splits: [a, b]", "eval_delay: -1.5"]
    lines += ["lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_kwargs: {min_lr: 1e-5}"]
    config.write_text("\n".join(lines))
    images, args, _ = parse(argv=[str(config), "--output_dir", str(tmp_path)])
    assert (args.eval_strategy, args.logging_strategy, args.report_to) == ("no", "no", [])
    assert (images.eval_splits, args.eval_delay) == (["a", "b"], -1.5)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}


@pytest.mark.parametrize("text", ["- a", "a: [1", "no_such_argument: 1"])
def test_a_yaml_file_that_is_wrong_ends_with_one_line(tmp_path, capsys, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(argv=[str(tmp_path / "run.yaml")])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "run.yaml must be YAML" in line or "--no_such_argument" in line


def test_every_amp_field_is_an_argument(tmp_path):
    amp = AMPConfig(0.2, 0.05, 0.5, 2, "tensor", "batch", 0.3, 2, 0.5, "norm", "both", True)
    argv = [f"--{name}={value}" for name, value in amp.to_dict().items()]
    assert parse(argv=[*argv, "--output_dir", str(tmp_path)])[2] == amp


def test_the_cpu_itself_says_whether_it_computes_in_bf16():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or torch.cuda.is_available():
        pytest.skip("for a CPU whose abilities Linux lists")
    able = {"avx512_bf16", "amx_tile"} & {*cpuinfo.read_text().split()}
    assert computes_in_bf16() == bool(able)


OWN = "--model=convnet7_objects --from_scratch"


@pytest.mark.skipif(not computes_in_bf16(), reason="for a processor that is fast in bf16")
@pytest.mark.parametrize(
    ("words", "variables", "bf16"),
    [
        (OWN, {}, True),
        (OWN, {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}, True),
        ("run.yaml", {}, True),
        ("run.yaml --bf16=false", {}, False),
        (OWN + " --run_name bf16", {}, True),
        (OWN + " --bf16=false", {}, False),
        (OWN + " --use_cpu", {}, False),
        (OWN + " --use-cpu=false", {}, False),
        (OWN, {"ACCELERATE_MIXED_PRECISION": "fp16"}, False),
        (OWN, {"ACCELERATE_USE_CPU": "True"}, False),
        (OWN, {"ACCELERATE_USE_DEEPSPEED": "true"}, False),
        (OWN, {"ACCELERATE_USE_FSDP": "true"}, False),
        ("--model=convnet7_objects", {}, False),
        ("--model=test_resnet --from_scratch", {}, False),
    ],
)
def test_a_recipes_own_network_computes_in_bf16_unless_something_else_is_asked_for(
    tmp_path, monkeypatch, words, variables, bf16
):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: convnet7_objects\nfrom_scratch: true\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    argv = [*words.split(), "--output_dir", str(tmp_path)]
    recipe = train_cifar10.DEFAULTS, train_cifar10.FROM_SCRATCH_DEFAULTS
    assert parse(*recipe, None, argv)[1].bf16 == bf16


def test_the_defaults_of_a_network_hold_for_it_alone(tmp_path):
    def rate(*words, recipe=train_cifar10):
        argv = [*words, "--output_dir", str(tmp_path)]
        images, args, _ = parse(recipe.DEFAULTS, recipe.FROM_SCRATCH_DEFAULTS, None, argv)
        return images.augment, args.learning_rate

    assert rate("--from_scratch") == ("light_objects", 0.75)
    assert rate("--from_scratch", "--learning_rate=0.5") == ("light_objects", 0.5)
    assert rate("--from_scratch", "--model=resnet18") == ("objects", 0.1)
    assert rate() == ("objects", 0.01)
    # Signs are fine-tuned at a rate of their own, and one network sees them at 48 pixels.
    assert rate(recipe=train_gtsrb) == ("strong_signs", 0.05)
    assert rate("--from_scratch", recipe=train_gtsrb) == ("strong_signs", 0.1)
    for words, size in (([], 48), (["--model=test_resnet"], 32), (["--image_size=40"], 40)):
        argv = ["--from_scratch", *words, "--output_dir", str(tmp_path)]
        recipe = train_gtsrb.DEFAULTS, train_gtsrb.FROM_SCRATCH_DEFAULTS
        images, args, _ = parse(*recipe, None, argv)
        assert (images.image_size, args.per_device_train_batch_size) == (size, 128)
    # The network for objects, on signs, of which a flip makes others.
    words = ["--from_scratch", "--model=convnet7_objects"]
    assert rate(*words, recipe=train_gtsrb) == ("strong_signs", 0.1)


def test_help_shows_the_defaults_that_hold_with_the_other_arguments(capsys):
    recipe = train_cifar10.DEFAULTS, train_cifar10.FROM_SCRATCH_DEFAULTS, train_cifar10.__doc__
    for words, epochs, batch in (([], 3, 128), (["--from_scratch"], 24, 512)):
        with pytest.raises(SystemExit) as exit:
            parse(*recipe, [*words, "--help"])
        assert exit.value.code == 0
        out = capsys.readouterr().out
        assert train_cifar10.__doc__.strip() in out  # with its lines
        flat = " ".join(out.split())
        for name, value in (("num_train_epochs", epochs), ("per_device_train_batch_size", batch)):
            default = re.search(rf"--{name}[ ,].*?\(default: (\w+)\)", flat)
            assert default[1] == str(value)


def test_only_what_is_trained_on_is_flipped_and_no_longer_where_flatness_is_measured(
    tmp_path, data
):
    words = [*SMALL.split(), "--augment=light_objects", "--dataset", data]
    words += ["--validation_fraction=0.2", "--max_train_samples=40", f"--output_dir={tmp_path}"]
    job = ImageJob(*parse(argv=words))
    train = job.trainer.train_dataset
    assert len(train.flip.first) == len(train) == 40
    plain = job.unaugmented(train, job.trainer.model)
    for dataset in (plain, job.trainer.eval_dataset, *job.tests.values()):
        assert dataset.flip is None


@pytest.mark.slow
def test_resuming_from_the_command_line_ends_where_the_uninterrupted_run_ends(
    tmp_path, data, capfd
):
    """Resumed after one epoch of two, against two epochs in one go."""
    common = [
        *SMALL.split(),
        "--dataset",
        data,
        "--epsilon=0.1",
        "--ascent_start=0.25",
        "--logging_steps=1",
    ]
    common += ["--per_device_train_batch_size=8", "--learning_rate=0.01"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        main(argv=[*common, "--output_dir", str(folder), "--save_strategy=epoch"])
    shutil.rmtree(parts / "checkpoint-40")
    (parts / "checkpoint-30").mkdir()  # the run was killed while it saved this one
    (parts / "checkpoint-30" / "model.safetensors").touch()
    capfd.readouterr()
    resumed = [*common, "--output_dir", str(parts), "--save_strategy=epoch"]
    main(argv=[*resumed, "--resume_from_checkpoint=true"])
    bar = capfd.readouterr().err
    assert "| 20/40 [00:00<?, " in bar and "| 1/40 " not in bar
    assert re.search(r"\| \d\d/40 \[\d\d:\d\d<\d\d:\d\d, .*, ends \d\d:\d\d\]", bar)
    a, b = (
        AutoModelForImageClassification.from_pretrained(folder).state_dict()
        for folder in (whole, parts)
    )
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_budget_sets_the_amp_config_and_further_arguments_override_it(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--budget=1.15"]
    assert parse(argv=argv)[2] == AMPConfig.for_budget(1.15)
    own = ["--epsilon=0.1", "--ascent_reuse=false", "--rise=0.3"]
    overridden = parse(argv=[*argv, *own])[2]
    assert overridden == AMPConfig(epsilon=0.1, rise=0.3, ascent_start=0.4, ascent_every=4)


def test_only_what_is_trained_on_is_mirrored_and_only_what_the_dataset_knows(
    tmp_path, data, caplog
):
    mirrored = {"zero": "zero", "six": "nine", "eight": "stop", "left": "right"}
    words = [*SMALL.split(), "--dataset", data, "--output_dir", str(tmp_path)]
    words += ["--validation_fraction=0.2", "--mirrored", json.dumps(mirrored)]
    job = ImageJob(*parse(argv=[*words, "--augment=strong_signs"]))
    assert "does not have: ['left', 'right', 'stop']." in caplog.text
    trained = job.trainer.train_dataset
    seen, own = trained.__getitems__([*range(len(trained))])["labels"], trained.labels
    changed = {(a, b) for a, b in zip(own.tolist(), seen.tolist()) if a != b}
    assert changed == {(6, 9), (9, 6)}
    plain = job.unaugmented(trained, job.trainer.model)
    others = ImageJob(*parse(argv=[*words, "--augment=signs"])).trainer.train_dataset
    for dataset in (plain, job.trainer.eval_dataset, job.tests["test"], others):
        everything = dataset.__getitems__([*range(len(dataset))])
        assert torch.equal(everything["labels"], dataset.labels)


def test_the_recipe_for_gtsrb_leaves_another_dataset_alone(tmp_path, data, monkeypatch, caplog):
    words = [*SMALL.split(), "--dataset", data, "--output_dir", tmp_path, "--max_steps", 1]
    run_here(RECIPES / "train_gtsrb.py", monkeypatch, *words)
    assert f"{data} has no class of --mirrored: nothing is mirrored." in caplog.text


@pytest.mark.skipif(not GTSRB.exists(), reason="needs a copy of GTSRB")
def test_the_mirrored_signs_are_signs_of_gtsrb():
    names = datasets.load_dataset(str(GTSRB), split="test").features["label"].names
    assert {*train_gtsrb.MIRRORED, *train_gtsrb.MIRRORED.values()} <= {*names}
    pairs = {one: other for one, other in train_gtsrb.MIRRORED.items() if one != other}
    assert {names.index(one): names.index(other) for one, other in pairs.items()} == {
        19: 20,
        34: 33,
        37: 36,
        39: 38,
    }


BAD = {
    "--eval_splits=fog": "--eval_splits: ",
    "--license=MIT License": "--license must be one of the Hub's identifiers, such as apache-2.0",
    "--budget=1": "AMPConfig.for_budget takes a finite number > 1",
    "--epsilon=-1": "AMPConfig.epsilon must be None or a finite number >= 0, got -1.0.",
    "--epsilon=nan": "AMPConfig.epsilon must be None or a finite number >= 0, got nan.",
    "--inner_lr=0": "AMPConfig.inner_lr must be a finite number > 0, got 0.0.",
    "--inner_steps=1.5": "argument --inner_steps/--inner-steps: invalid int value: '1.5'",
    "--ball=cube": "invalid choice: 'cube' (choose from",
    "--perturb=(": "AMPConfig.perturb must be 'all', 'norm' or a regular expression",
    "--perturb=nothing_like_it": "AMPConfig.perturb='nothing_like_it' matches no trainable",
    "--model=resnet8": "did you mean",
    "--dataset=no/such/folder": "Pass --dataset a local folder",
    "--image_size=0": "--image_size must be at least 1, got 0.",
    "--image_size=1": "does not work on images of 1x1 pixels",
    "--validation_fraction=1": "--validation_fraction must be in [0, 1), got 1.0.",
    "--output_dir=/dev/null/x": "--output_dir '/dev/null/x' cannot be written to",
    "--optim=lomo": "steps inside the backward pass",
    "--no_such_argument=1": "--no_such_argument=1",
    "--resume_from_checkpoint=true": "--resume_from_checkpoint true: no checkpoint there",
    "--resume_from_checkpoint=no/such": "--resume_from_checkpoint no/such: no checkpoint there",
    "--label_column=nope": "has no label column 'nope'; it has img (Image), label (ClassLabel): "
    "name one with --label_column.",
    "--label_column=img": "has no label column 'img'; it has img (Image), label",
    "--image_column=label": "has no image column 'label'; it has img (Image), label",
    "--cutout=-4": "--cutout must be at least 0, got -4.",
    "--mirrored=left:right": "--mirrored must be a JSON object, got left:right.",
    '--mirrored={"a": "b", "c": "b"}': "--mirrored must name one mirror image of each class",
    "--model_args=[4]": "--model_args must be a JSON object, got [4].",
    "--model_args={4": "--model_args must be a JSON object, got {4.",
    '--model_args={"nope": 4}': "change --model_args, raise --image_size",
    '--model_args={"norm_layer": "zzz"}': "change --model_args, raise --image_size",
    '--model_args={"features_only": true}': "change --model_args, raise --image_size",
    "--model=recipes": "--model recipes is a folder without a saved timm model",
    "--report_to=clearml": "requires 'clearml' to be installed",
    "--load_best_model_at_end=true": "but found - Evaluation strategy: ",
    "--prediction_loss_only=true": "--prediction_loss_only must be false: accuracy, NLL and ECE",
    "--eval_do_concat_batches=false": "--eval_do_concat_batches must be true: accuracy, NLL",
    "--batch_eval_metrics=true": "--batch_eval_metrics must be false: accuracy, NLL and ECE",
    "--do_train=false": "--do_train must be true: a recipe trains, and then evaluates",
    "--eval_on_start=true": "--eval_on_start needs rows to evaluate on: add --validation_fraction",
    "--bf16_full_eval=true": "--bf16_full_eval must be false: it casts the model itself",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_ends_with_one_line_that_says_what_to_do(
    tmp_path, data, capsys, monkeypatch, argument
):
    monkeypatch.chdir(RECIPES.parent)
    good = [*SMALL.split(), "--model=vit_tiny_patch16_224", "--dataset", data]
    with pytest.raises(SystemExit) as exit:
        main(argv=[*good, "--output_dir", str(tmp_path), argument])
    assert exit.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert BAD[argument] in lines[-1]
    assert [line for line in lines[:-1] if not line.startswith("usage: ")] == []


def test_an_image_that_a_worker_cannot_decode_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_data, "IN_MEMORY_BYTES", 0)
    data = rows(0, 64).cast_column("img", datasets.Image(decode=False))
    cells = data[:]
    cells["img"][13] = {"bytes": b"\x89PNG\r\n broken", "path": None}
    (tmp_path / "set").mkdir()
    broken = datasets.Dataset.from_dict(cells, rows(0, 1).features)
    broken.to_parquet(tmp_path / "set" / "train.parquet")
    argv = [*SMALL.split(), "--dataset", str(tmp_path / "set"), "--output_dir", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as exit:
        main(argv=[*argv, "--dataloader_num_workers=2"])
    assert exit.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ": error: Image 13 of column 'img' cannot be decoded: " in last


def spoiled(folder, split, spoil):
    """A folder of 64 training and 16 test images, `spoil(cells)` having been at one split."""
    for name, (start, stop) in {"train": (0, 64), "test": (64, 80)}.items():
        data = rows(start, stop).cast_column("img", datasets.Image(decode=False))
        cells = data[:]
        if name == split:
            spoil(cells)
        made = datasets.Dataset.from_dict(cells, rows(0, 1).features)
        made.to_parquet(folder / f"{name}.parquet")
    return ["--dataset", str(folder), "--output_dir", str(folder / "out")]


def failure(capsys, *argv):
    """The exit code of the recipe, and the last line it prints."""
    with pytest.raises(SystemExit) as exit:
        main(argv=[*SMALL.split(), *argv])
    return exit.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_a_misspelt_model_is_refused_before_the_dataset_is_loaded(tmp_path, capsys):
    words = ["--dataset=no/such/folder", "--model=resnet8", f"--output_dir={tmp_path}"]
    assert "--model 'resnet8' is neither a timm model" in failure(capsys, *words)[1]


def test_a_broken_image_is_named_by_its_number_in_the_dataset_also_among_chosen_ones(
    tmp_path, capsys
):
    def spoil(cells):
        cells["img"][13] = {"bytes": b"\x89PNG\r\n broken", "path": None}

    argv = spoiled(tmp_path, "train", spoil)
    chosen = ["--max_train_samples=50", "--validation_fraction=0.2", "--seed=3"]
    code, line = failure(capsys, *argv, *chosen)
    assert code == 2 and ": error: Image 13 of column 'img' cannot be decoded: " in line


@pytest.mark.parametrize("label", [-1, None])
def test_an_unlabeled_image_is_named_by_its_number(tmp_path, capsys, label):
    argv = spoiled(tmp_path, "train", lambda cells: cells["label"].__setitem__(13, label))
    for held_out in ("0", "0.2"):
        code, line = failure(capsys, *argv, f"--validation_fraction={held_out}")
        assert code == 2 and f"Label {label} of row 13 is none of the 10 classes" in line


def test_without_labels_in_the_test_split_there_are_no_test_results(tmp_path, capsys):
    argv = spoiled(tmp_path, "test", lambda cells: cells.__setitem__("label", [-1] * 16))
    found = main(argv=[*SMALL.split(), *argv])
    assert "The test split has no labels" in capsys.readouterr().out
    assert "train_loss" in found and "test_accuracy" not in found


def test_a_training_that_diverges_is_saved_and_ends_with_one_line(tmp_path, data, capsys):
    argv = ["--dataset", data, "--output_dir", str(tmp_path), "--learning_rate=1e30"]
    code, line = failure(capsys, *argv)
    assert code == 1 and line.startswith("The training diverged: lower --learning_rate")
    assert (tmp_path / "model.safetensors").exists()


def frames_of(digit, count, random):
    """A digit as a video shows it: its light and its background are its own, and drift."""
    light, background = random.uniform(0.3, 1), random.uniform(0, 255, 3)
    strokes = np.asarray(digit, dtype=float)[..., None] / 255
    for _ in range(count):
        light += random.normal(0, 0.01)
        image = light * (strokes * 255 + (1 - strokes) * background) + random.normal(0, 2, 3)
        yield Image.fromarray(image.clip(0, 255).astype(np.uint8))


def test_what_one_track_shows_is_not_divided_between_training_and_validation(tmp_path):
    frames, random = 6, np.random.default_rng(0)
    digits, shown, labels, numbers = rows(0, 160), [], [], []
    for number, row in enumerate(digits):
        shown += frames_of(row["img"], frames, random)
        labels += [row["label"]] * frames
        numbers += [number] * frames
    (tmp_path / "data").mkdir()
    order = random.permutation(len(shown))
    table = {"img": [shown[i] for i in order], "label": [labels[i] for i in order]}
    table = datasets.Dataset.from_dict(table, digits.features)
    for split in ("train", "test"):
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    number_of = np.array(numbers)[order]
    divided, sizes = {}, {}
    for length in (1, frames):
        argv = [*SMALL.split(), "--dataset", str(tmp_path), "--validation_fraction=0.25"]
        argv += [f"--track_length={length}", "--output_dir", str(tmp_path / "out")]
        job = ImageJob(*parse(argv=argv))
        parts = [number_of[rows[NUMBER][:]] for rows in (job.rows.train, job.rows.validation)]
        assert sum(map(len, parts)) == len(shown)
        divided[length] = len(np.intersect1d(*parts)) / len(digits)
        sizes[length] = len(parts[1]) / len(shown)
        assert set(job.rows.train["label"]) == set(job.rows.validation["label"]) == {*range(10)}
    assert divided[1] > 0.7 and divided[frames] < 0.1
    assert sizes[1] == 0.25 and abs(sizes[frames] - 0.25) < 0.05


def test_a_dataset_with_one_image_of_each_class_is_not_divided(tmp_path, capsys):
    parquet_folder(tmp_path, train=10, test=10)  # the digits from 0 to 9
    words = ["--dataset", str(tmp_path), "--validation_fraction=0.5", "--track_length=2"]
    code, line = failure(capsys, *words, "--output_dir", str(tmp_path / "out"))
    assert code == 2 and "--validation_fraction: no class has more than one row" in line


def test_rows_are_held_out_where_a_class_has_only_one_and_where_they_are_few(tmp_path):
    parquet_folder(tmp_path, train=25, test=10)  # three of the digits 0 to 4, two of the others
    table = datasets.load_dataset(str(tmp_path))["train"]
    for numbers, fraction, expected in (
        ([*range(9), *range(10, 19)], 0.5, 9),  # two of each, but no 9
        ([*range(10), 10, 20], 0.2, 1),  # one of each, but three zeros
        ([*range(20)], 0.05, 10),  # one of each is more than a twentieth
    ):
        table.select(numbers).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
        argv = [*SMALL.split(), "--dataset", str(tmp_path), f"--validation_fraction={fraction}"]
        rows = ImageJob(*parse(argv=[*argv, "--output_dir", str(tmp_path / "out")])).rows
        assert len(rows.validation) == expected
        assert set(rows.validation["label"]) <= set(rows.train["label"])


def test_a_rare_class_is_on_both_sides_of_a_split(tmp_path):
    labels = datasets.Dataset.from_dict({"label": [0] * 480 + [1] * 480 + [2] * 3})
    labels = labels.cast_column("label", datasets.ClassLabel(names=["a", "b", "rare"]))
    for fraction in (0.1, 0.8):
        for part in _divided(labels, "label", None, fraction, 42):
            assert set(part["label"]) == {0, 1, 2}


def test_a_dataset_of_one_class_is_refused(tmp_path, capsys):
    one = rows(0, 8).map(lambda row: {"kind": "digit"}).remove_columns("label")
    one.to_parquet(tmp_path / "one.parquet")
    words = ["--dataset", str(tmp_path / "one.parquet"), "--label_column=kind"]
    code, line = failure(capsys, *words, f"--output_dir={tmp_path / 'out'}")
    assert code == 2 and "has one class in column 'kind', ['digit']" in line


def test_that_a_split_is_left_out_is_said(tmp_path, capsys):
    for split, stop in (("train", 64), ("validation", 80), ("test", 96)):
        rows(stop - 16 if split != "train" else 0, stop).to_parquet(tmp_path / f"{split}.parquet")
    words = [*SMALL.split(), "--dataset", str(tmp_path), f"--output_dir={tmp_path / 'out'}"]
    for fraction, size, said in ((0.0, 16, False), (0.25, 16, True)):
        job = ImageJob(*parse(argv=[*words, f"--validation_fraction={fraction}"]))
        assert len(job.rows.validation) == size
        assert ("The validation split is ignored" in capsys.readouterr().out) is said


def test_that_nothing_will_be_evaluated_is_said(tmp_path, capsys):
    rows(0, 64).to_parquet(tmp_path / "train.parquet")
    words = ["--dataset", str(tmp_path / "train.parquet"), f"--output_dir={tmp_path / 'out'}"]
    for fraction, said in ((0.0, True), (0.25, False)):
        ImageJob(*parse(argv=[*SMALL.split(), *words, f"--validation_fraction={fraction}"]))
        assert ("There is nothing to evaluate" in capsys.readouterr().out) is said


def test_a_class_too_large_to_compare_all_of_its_images_is_refused(tmp_path, data, monkeypatch):
    monkeypatch.setattr(tracks, "LARGEST", 10)
    argv = [*SMALL.split(), "--dataset", data, "--validation_fraction=0.1", "--track_length=5"]
    with pytest.raises(ValueError, match="up to 10 of them, and class 0 has 1"):
        ImageJob(*parse(argv=[*argv, "--output_dir", str(tmp_path)]))


def test_a_class_of_one_track_is_trained_on_and_validated(tmp_path, data):
    argv = [*SMALL.split(), "--dataset", data, "--validation_fraction=0.1", "--track_length=1000"]
    job = ImageJob(*parse(argv=[*argv, "--output_dir", str(tmp_path)]))
    for part in (job.rows.train, job.rows.validation):
        assert set(part["label"]) == {*range(10)}


def test_splits_to_test_on_may_have_the_names_of_those_to_train_and_validate_on(tmp_path, data):
    argv = [*SMALL.split(), "--dataset", data, "--output_dir", str(tmp_path)]
    argv += ["--max_train_samples=50", "--validation_fraction=0.25", "--eval_splits", "train"]
    job = ImageJob(*parse(argv=argv))
    assert [len(job.trainer.train_dataset), len(job.trainer.eval_dataset)] == [50, 40]
    assert {name: len(test) for name, test in job.tests.items()} == {"test": 80, "train": 160}


def test_sgd_has_the_momentum_that_is_asked_for(tmp_path, data):
    argv = [*SMALL.split(), "--dataset", data, "--output_dir", str(tmp_path)]
    trainer = ImageJob(*parse(argv=argv)).trainer
    groups = trainer.create_optimizer().param_groups
    assert {(group["momentum"], group["nesterov"]) for group in groups} == {(0.9, True)}


def test_a_last_batch_of_one_image_is_dropped(tmp_path, data):
    argv = ["--dataset", data, "--output_dir", str(tmp_path), "--max_train_samples=33"]
    argv += ["--per_device_train_batch_size=16", "--remove_unused_columns=true"]
    found = main(argv=[*SMALL.split(), *argv, "--max_eval_samples=7"])
    assert round(found["test_accuracy"] * 7, 6) in range(8)  # no image is left out of the test
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 4


@pytest.mark.slow
def test_a_process_of_the_digits_recipe_ends_with_code_1_and_one_line():
    command = [sys.executable, RECIPES / "train_digits.py", "--budget=0"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("train_digits.py: error: ")


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        (search_epsilon, ["--trials=0"], "--trials must be at least 1, got 0."),
        (search_epsilon, ["--lowest=2"], "below --highest, and --highest finite, got 2.0, 1.0"),
        (search_epsilon, ["--highest=inf"], "below --highest, and --highest finite, got 0.02, inf"),
        (search_epsilon, ["--epsilon=0.3"], "--epsilon is what is searched for: leave it out."),
        (search_epsilon, ["--push_to_hub"], "--push_to_hub is for the training that follows"),
        (search_epsilon, ["--hub_token=x"], "--hub_token is for the training that follows"),
        (search_epsilon, ["--eval_strategy=epoch"], "--eval_strategy must be no: "),
        (search_epsilon, ["--validation_fraction=0"], "--validation_fraction must be above 0: "),
        (search_epsilon, ["--model=resnet8", "--dataset", "{data}"], "did you mean resnet18"),
        (train_digits, ["--epochs=1", "--perturb=nope"], "matches no trainable parameter"),
        (train_digits, ["--epochs=1", "--output_dir=/dev/null/x"], "/dev/null/x"),
        (train_digits, ["--epochs=1", "--train_samples=33"], "--train_samples"),
        (train_digits, ["--budget=0"], "takes a finite number > 1"),
        (train_digits, ["--seed=7"], "['--seed=7']"),  # not a short form of --seeds
    ],
)
def test_bad_input_to_the_search_and_the_digits_recipe_ends_with_one_line(
    tmp_path, monkeypatch, data, recipe, words, said
):
    monkeypatch.chdir(tmp_path)
    assert said in error_of(recipe, monkeypatch, *(word.format(data=data) for word in words))


def test_a_search_in_which_every_epsilon_does_harm_recommends_none(
    tmp_path, data, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", data, "--trials=1", "--lowest=20", "--highest=30"]
    words += ["--num_train_epochs=20"]  # after two, nothing is learnt that ε could spoil
    main_of(search_epsilon, monkeypatch, *SMALL.split(), *words)
    out = capsys.readouterr().out
    assert "Best: epsilon 0 (" in out
    assert out.splitlines()[-1].endswith("--epsilon 0")


def test_a_search_whose_trials_all_diverge_keeps_what_was_found_without_them(
    tmp_path, data, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    original = AMPTrainer.evaluate

    def evaluate(trainer, *args, **kwargs):
        metrics = original(trainer, *args, **kwargs)
        if trainer.amp_config.epsilon not in (0, None):
            metrics["eval_nll"] = math.nan
        return metrics

    monkeypatch.setattr(AMPTrainer, "evaluate", evaluate)
    words = ["--dataset", data, "--trials=1", "--max_steps=2"]
    main_of(search_epsilon, monkeypatch, *SMALL.split(), *words)
    printed = capsys.readouterr()
    assert "No trials are completed yet" in printed.err
    assert re.search(r"Best: epsilon .* \(held-out NLL [\d.]+\)", printed.out)


@pytest.mark.slow
def test_epsilon_is_searched_on_held_out_images_and_the_command_printed_trains_with_it(
    tmp_path, data, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [word for word in SMALL.split() if word not in ("--num_train_epochs", "2")]
    words += ["--dataset", data, "--max_train_samples=16"]
    own = {"model": "test_resnet", "num_train_epochs": 1}
    monkeypatch.setattr(train_cifar10, "FROM_SCRATCH_DEFAULTS", own)
    epochs = []
    original = AMPTrainer.evaluate

    def evaluate(trainer, *args, **kwargs):
        epochs.append(trainer.state.epoch)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(AMPTrainer, "evaluate", evaluate)
    main_of(search_epsilon, monkeypatch, "--trials=3", *words)
    assert set(epochs) == {1}  # as many as the recipe's
    out = capsys.readouterr().out
    tried = re.findall(r"(epsilon .+): held-out accuracy [\d.]+, NLL ([\d.]+)", out)
    best, loss = re.search(r"Best: (epsilon .+) \(held-out NLL ([\d.]+)\)", out).groups()
    assert len(tried) == 5
    assert [name for name, _ in tried[:2]] == ["epsilon 0", "epsilon that sets itself"]
    assert (best, loss) == min(tried, key=lambda trial: float(trial[1]))
    command = shlex.split(out.splitlines()[-1])
    assert command[:2] == ["python", "recipes/train_cifar10.py"]
    run_here(RECIPES / "train_cifar10.py", monkeypatch, *command[2:], "--output_dir=out")
    expected = None if best == "epsilon that sets itself" else float(best.split()[1])
    assert AMPConfig.from_json_file("out/amp_config.json").epsilon == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_evaluate_as_one_does(tmp_path, data, monkeypatch):
    """79 test images over two processes: the one that fills up the last batch is not counted."""
    common = [*SMALL.split(), "--model=test_vit", "--image_size=32"]
    common += ["--dataset", data, "--max_eval_samples=79", "--per_device_eval_batch_size=16"]
    common += ["--learning_rate=0", "--epsilon=0.1", "--ascent_start=0.9"]
    run_here(RECIPES / "train_gtsrb.py", monkeypatch, *common, "--output_dir", tmp_path / "1")
    two = [*common, "--output_dir", tmp_path / "2"]
    on_ranks(run_recipe, {}, *map(str, [RECIPES / "train_gtsrb.py", *two]))
    states = [json.loads((tmp_path / n / "trainer_state.json").read_text()) for n in "12"]
    assert [state["global_step"] for state in states] == [4, 2]  # 128 images a process
    one, two = results(tmp_path / "1"), results(tmp_path / "2")
    for name in ("test_accuracy", "test_nll", "test_ece"):
        assert two[name] == pytest.approx(one[name], abs=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [ImageArguments, TextArguments, train_digits.DigitsArguments, search_epsilon.SearchArguments],
)
def test_every_argument_has_a_help_text(arguments):
    fields = arguments.__dataclass_fields__.values()
    assert [field.name for field in fields if "help" not in field.metadata] == []

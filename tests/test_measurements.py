"""The scripts of recipes/measurements, and its README.md, whose tables are those of the JSON."""

import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re

import benchmark_step
import cost_plot
import erm_comparison
import erm_settings
import frontier
import language_model
import matplotlib
import on_gpu
import plan
import pytest
import runs
import torch
import variants
from images import parquet_folder, rows
from processes import FORKS
from scripts import RECIPES, error_of, main_of
from texts import csv_folder, save_encoder
from transformers import EvalPrediction, Trainer, TrainerCallback

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.flatness import LossSurface
from amp_hf.images.arguments import parse
from amp_hf.images.classification import ImageJob
from amp_hf.text.classification import TextJob

MEASUREMENTS = RECIPES / "measurements"
SMALL = "test_resnet:24:8", benchmark_step.BenchmarkArguments(workloads=["test_resnet:24:8"]), False


def saved_runs(script, folder=MEASUREMENTS, machine=""):
    path = folder / f"{script.__name__}{machine}.json"
    return runs.Runs(script.SETTINGS, script.ROWS, plan.RunArguments(), path)


@pytest.mark.slow
def test_the_benchmark_compares_steps_and_memory_and_writes_them_down(
    tmp_path, monkeypatch, capsys
):
    """Times mean nothing here; that memory is counted does."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: FORKS)  # import nothing
    words = ["--workloads=test_resnet:24:8", "--rounds=2", "--json", tmp_path / "out.json"]
    words += ["--trainers", "AMPTrainer"]
    main_of(benchmark_step, monkeypatch, *words, benchmark_step.AUGMENTING)
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    rows = result["trainers"]
    assert list(rows) == ["AMPTrainer"]
    assert rows["AMPTrainer"]["memory_copies"] == pytest.approx(1, abs=0.02)
    out = capsys.readouterr().out
    assert f"{rows['AMPTrainer']['time'][1]:.3f} [" in out and "Images augmented as they" in out
    main_of(benchmark_step, monkeypatch, *words, "--compile=default")
    assert "Images augmented" not in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["trainers"].keys() == {"AMPTrainer"} and result["throughput"] is None


@pytest.mark.parametrize("name", benchmark_step.ALTERNATIVES)
def test_what_the_benchmark_compares_with_does_the_steps_that_it_is_compared_for(name):
    """SAM's perturbation is one of AMP's that always reaches the ball."""
    kind = dict(ball="tensor") if name == "AMP as released" else dict(inner_lr=1e6)
    config = AMPConfig(benchmark_step.RADIUS, **kind, norm_stats="both")
    after = []
    for own in (benchmark_step.TRAINERS[name], dict(cls=AMPTrainer, amp_config=config)):
        trainer = benchmark_step.build(*SMALL, **own)
        trainer.args.max_steps = 1  # LookSAM's first step is SAM's
        trainer.train()
        after.append([param.detach() for param in trainer.model.parameters()])
    start = benchmark_step.build(*SMALL, cls=Trainer).model
    moved = [a - p for a, p in zip(after[0], start.parameters())]
    expected = [a - p for a, p in zip(after[1], start.parameters())]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    assert max(move.abs().max() for move in moved) > 1e-4


def step_of(trainer, steps=1):
    """Trains, and returns the parameters before and after."""
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.args.max_steps = steps
    trainer.train()
    return before, [param.detach() for param in trainer.model.parameters()]


def test_asam_perturbs_by_rho_in_units_of_the_weights():
    trainer = benchmark_step.build(*SMALL, cls=variants.ASAM, amp_config=AMPConfig(0.5))
    model, seen = trainer.model, []
    model.register_forward_pre_hook(
        lambda *args: seen.append([param.detach().clone() for param in model.parameters()])
    )
    step_of(trainer)
    theta, displaced = seen
    fresh = benchmark_step.build(*SMALL, cls=Trainer)
    batch = next(iter(fresh.get_train_dataloader()))
    fresh.model.train()
    fresh.compute_loss(fresh.model, batch).backward()
    units = [
        param.detach().abs() + 0.01 if "weight" in name else torch.ones_like(param)
        for name, param in fresh.model.named_parameters()
    ]
    scaled = [t * p.grad for t, p in zip(units, fresh.model.parameters())]
    length = torch.cat([part.flatten() for part in scaled]).norm()
    expected = [0.5 * t * part / length for t, part in zip(units, scaled)]
    moved = [b - a for a, b in zip(theta, displaced)]
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)


def test_both_passes_of_a_step_see_the_same_mixtures():
    config = AMPConfig(epsilon=0.1)
    trainer = benchmark_step.build(*SMALL, cls=variants.MixedUp, amp_config=config)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    step_of(trainer, steps=2)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    images = next(iter(trainer.get_train_dataloader()))["pixel_values"]
    assert not torch.isclose(seen[0][0], images).flatten(1).all(1).any()


def test_the_average_of_the_weights_is_what_training_ends_at():
    trainer = benchmark_step.build(*SMALL, cls=variants.Averaged, amp_config=AMPConfig(epsilon=0))
    states = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            states.append(copy.deepcopy(model.state_dict()))

    trainer.add_callback(Record())
    step_of(trainer, steps=4)
    for name, value in trainer.model.state_dict().items():
        if value.is_floating_point():
            average = states[0][name]
            for state in states[1:]:
                average = 0.99 * average + 0.01 * state[name]
            torch.testing.assert_close(value, average)
    assert not torch.equal(states[-1][name], states[0][name])


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (benchmark_step, ["--workloads=resnet18:32"], "takes model:image size:batch size"),
        (benchmark_step, ["--workloads=resnet8:32:4"], "did you mean resnet18"),
        (benchmark_step, ["--trainers", "SAM"], "--trainers knows AMPTrainer, "),
        (benchmark_step, ["--rounds=1"], "--rounds must be at least 2, got 1."),
        (frontier, ["--rows", "SAM"], "--rows knows ERM, "),
        (
            frontier,
            ["--settings", "mnist"],
            "--settings knows cifar10, gtsrb, gtsrb_short, not 'mnist'.",
        ),
        (frontier, ["--data", "no/such"], "Pass --data a folder of local copies"),
        (frontier, ["--row=ERM"], "['--row=ERM']"),  # not a short form of --rows
        (
            erm_comparison,
            ["--tables", "grids"],
            "--tables knows choice, results, defaults, others, rises, recipes, grid",
        ),
        (erm_comparison, ["--data", "no/such"], "Pass --data a folder of local copies"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, script, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in error_of(script, monkeypatch, *words)


TRAINING = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
for name, whole in (("checkpoint-7", True), ("checkpoint-8", False)):
    (folder / name).mkdir(exist_ok=True)
    if whole:
        (folder / name / "trainer_state.json").touch()
if sys.argv[-2:] != ["--resume_from_checkpoint", "true"]:
    time.sleep(1000)
(folder / "all_results.json").write_text(json.dumps({"test_accuracy": 0.5}))
"""


@pytest.mark.slow
def test_what_the_time_cuts_off_on_a_gpu_goes_on_the_next_time(tmp_path, monkeypatch, capsys):
    """A process that is done, one that fails, and one that saves a checkpoint and takes long."""
    (tmp_path / "train_long.py").write_text(TRAINING)
    jobs = {
        "done": ["-c", "print('all is well')"],
        "fails": ["-c", "raise SystemExit(3)"],
        "long": [str(tmp_path / "train_long.py")],
    }
    monkeypatch.setattr(on_gpu, "jobs", lambda data: jobs)
    monkeypatch.setattr(on_gpu, "LEAST", 0)
    words = ["--output", tmp_path / "on_gpu.json", "--cache", tmp_path / "cache", "--minutes=0.1"]
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        main_of(on_gpu, monkeypatch, *words)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    main_of(on_gpu, monkeypatch, *words)
    out = capsys.readouterr().out
    assert "done: ['all is well']" in out and "fails: failed; see" in out
    assert "long: not finished; see" in out and "Missing: fails, long." in out
    first = json.loads((tmp_path / "on_gpu.json").read_text())
    assert [*first] == ["done"]

    jobs["fails"] = ["-c", "print('mended')"]
    main_of(on_gpu, monkeypatch, *words)
    out = capsys.readouterr().out
    assert "All is done." in out and "all is well" not in out
    found = json.loads((tmp_path / "on_gpu.json").read_text())
    assert found["done"] == first["done"]
    assert found["fails"]["result"] == ["mended"]
    assert found["long"]["result"] == {"test_accuracy": 0.5}


def test_the_list_for_a_gpu_is_made_of_arguments_that_exist(tmp_path):
    for name, words in on_gpu.jobs("copies").items():
        if "train_" in words[0]:
            own, args, config = parse(
                {}, {}, None, [*words[1:], "--use_cpu", f"--output_dir={tmp_path}"]
            )
            assert own.from_scratch and args.bf16
            assert (config.epsilon == 0) == ("ERM" in name)
        assert os.path.exists(words[0]) or words[0] == "-m"


@pytest.mark.slow
def test_the_frontier_goes_on_where_it_was_and_draws_what_it_has(tmp_path, monkeypatch, capsys):
    parquet_folder(tmp_path / "gtsrb", train=33, test=40)
    short = dataclasses.replace(frontier.SETTINGS["gtsrb"], epochs=2)
    monkeypatch.setitem(frontier.SETTINGS, "gtsrb", short)
    words = ["--data", tmp_path, "--settings", "gtsrb", "--rounds=2"]
    words += ["--output", tmp_path / "frontier.json"]
    rows = ["--rows", "ERM", "AMP, ε 0.1"]
    main_of(frontier, monkeypatch, *words, *rows, "--seeds", 0)
    first = json.loads((tmp_path / "frontier.json").read_text())
    rows += [name for name, row in frontier.ROWS.items() if row.trainer is not AMPTrainer]
    main_of(frontier, monkeypatch, *words, *rows, "--seeds", 0, 1)
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert found["runs"][:2] == first["runs"]  # with their seconds
    done = [(run["row"], run["seed"]) for run in found["runs"]]
    assert len(done) == len(set(done)) == 12
    assert found["times"]["gtsrb"].keys() == set(rows[1:])
    assert found["times"]["gtsrb"]["ERM"] == [1, 1]
    table = frontier.table(saved_runs(frontier, tmp_path), "gtsrb")
    assert table in capsys.readouterr().out
    accuracies = [100 * run["accuracy"] for run in found["runs"] if run["row"] == rows[2]]
    assert f"{sum(accuracies) / 2:.2f} ± " in table
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    main_of(frontier, monkeypatch, "--print_only", "--output", tmp_path / "frontier.json")
    assert table in capsys.readouterr().out
    assert json.loads((tmp_path / "frontier.json").read_text()) == found


def test_a_row_whose_radius_sets_itself_is_not_timed_where_it_would_stay_plain(tmp_path):
    rows = {"AMP()": plan.Row(), "budget 1.15": plan.Row(budget=1.15)}
    options = plan.RunArguments(rounds=1)
    timed = runs.Runs(frontier.SETTINGS, rows, options, tmp_path / "x.json")
    timed.time([("gtsrb", "AMP()"), ("gtsrb", "budget 1.15")])
    assert timed.found["times"] == {}


def test_only_the_data_of_what_is_run_must_be_there(tmp_path):
    (tmp_path / "gtsrb").mkdir()
    options = plan.RunArguments(data=str(tmp_path))
    found = runs.Runs(frontier.SETTINGS, frontier.ROWS, options, tmp_path / "x.json")
    found.fill([("gtsrb", "ERM")], seeds=[])
    with pytest.raises(ValueError, match="has no folder 'cifar10'"):
        found.fill([("gtsrb", "ERM"), ("cifar10", "ERM")], seeds=[])


def test_a_frontier_without_erm_is_drawn(tmp_path):
    run = dict(setting="gtsrb", row="AMP, ε 0.1", seed=0, accuracy=0.8, nll=0.5, ece=0.1)
    times = {"gtsrb": {"ERM": [1.0], "AMP, ε 0.1": [2.0]}}
    (tmp_path / "frontier.json").write_text(json.dumps({"runs": [run], "times": times}))
    frontier.plot(saved_runs(frontier, tmp_path), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").exists()


def documented():
    names = ("README.md", "TABLES.md", "CHOICES.md")
    return "\n".join((MEASUREMENTS / name).read_text() for name in names)


def test_the_tables_of_the_frontier_are_those_of_its_results():
    found = saved_runs(frontier)
    for key in frontier.SETTINGS:
        assert frontier.table(found, key) in documented()


def test_passes_count_what_a_row_takes():
    rows = erm_settings.ROWS
    once, twice = ("ERM", "MixUp", "label smoothing 0.1"), ("AMP", "SAM, ρ 0.05", "ASAM, ρ 0.5")
    assert {rows[name].passes for name in once} == {1}
    assert {rows[name].passes for name in (*twice, "ERM, 2 × the epochs")} == {2}
    assert {rows[name].passes for name in ("AMP()", "MixUp, AMP()")} == {1.8}
    assert rows["budget 1.15"].passes == 1.15


def test_the_picture_names_every_row_that_has_runs(tmp_path):
    names = ("ERM", "AMP()", "AMP", "MixUp", "average of the weights")
    picture = tmp_path / "cost.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        found = saved_runs(erm_comparison)
        cost_plot.draw_costs(found, ["gtsrb test_resnet", "digits test_vit"], names, picture)
    written = re.findall(r">([^<>]+)</text>", picture.read_text())
    assert [written.count(name) for name in ("ERM", "AMP()", "AMP, ε 0.4")] == [6, 6, 3]
    # The second setting has no such runs.
    assert written.count("MixUp") == written.count("EMA") == 3


@pytest.mark.parametrize("script", [erm_comparison, frontier])
def test_a_command_that_is_kept_is_that_of_its_row(script):
    found = saved_runs(script)
    for run in found.found["runs"]:
        key = run["setting"]
        if not (script.SETTINGS[key].recipe or script.SETTINGS[key].base):
            assert run["command"] == found.command(key, run["row"], run["seed"])


@pytest.mark.slow
@pytest.mark.parametrize("script", [erm_comparison, frontier])
def test_every_command_says_how_it_augments_and_holds_out(script):
    """The recipes have defaults of their own, which only the runs of a recipe itself take."""
    settings = [setting for setting in script.SETTINGS.values() if not setting.recipe]
    found = saved_runs(script).found["runs"]
    found = [run for run in found if not script.SETTINGS[run["setting"]].recipe]
    commands = [run["command"] for run in found if "debian_sections" not in run["command"]]
    assert all("--augment " in command for command in commands)
    held_out = [command for command in commands if "--validation_fraction" in command]
    assert all("--track_length 1 " in command for command in held_out)
    assert not any("strong_signs" in command for command in commands)  # mirrors, in that recipe
    images = [setting for setting in settings if setting.job is ImageJob]
    assert all("--augment " in setting.argv for setting in images)


def test_the_comparison_goes_on_where_it_was_and_makes_its_tables(tmp_path, monkeypatch, capsys):
    """Of a network from scratch and of one that was trained here, one seed and then another."""
    parquet_folder(tmp_path / "gtsrb", train=48, test=40)
    few = functools.partialmethod(LossSurface.top_eigenvalue, tolerance=1e9)
    monkeypatch.setattr(LossSurface, "top_eigenvalue", few)
    monkeypatch.setattr(runs, "CACHE", str(tmp_path / "cache"))
    for key in erm_comparison.GRID:
        setting = dataclasses.replace(erm_comparison.SETTINGS[key], epochs=1)
        monkeypatch.setitem(erm_comparison.SETTINGS, key, setting)
    words = ["--data", tmp_path, "--output", tmp_path / "erm_comparison.json", "--rounds=0"]
    words += ["--rows", "ERM", "budget 1.15", "held out, ERM", "held out, ε 0.4"]
    words += ["--settings", *erm_comparison.GRID]
    main_of(erm_comparison, monkeypatch, *words, "--seeds=0", "--tables", "choice", "grid")
    first = json.loads((tmp_path / "erm_comparison.json").read_text())["runs"]
    assert len(first) == 6
    assert all("eigenvalue" not in run for run in first)
    tuned = [run for run in first if erm_settings.SETTINGS[run["setting"]].base]
    assert "--model gtsrb_test_resnet_short" in tuned[0]["command"]
    cached = list((tmp_path / "cache").glob("*/gtsrb_test_resnet_short/model.safetensors"))
    assert len(cached) == 1  # which another copy of the data does not share
    assert tuned[0]["nll"] != first[0]["nll"]
    main_of(erm_comparison, monkeypatch, *words, "--seeds", 0, 1)
    found = json.loads((tmp_path / "erm_comparison.json").read_text())["runs"]
    assert found[:6] == first  # with their seconds
    done = [(run["setting"], run["row"], run["seed"]) for run in found]
    assert len(done) == len(set(done)) == 2 * 6 + 2 * 4
    assert all(("eigenvalue" in run) == erm_settings.ROWS[run["row"]].curvature for run in found)
    out = capsys.readouterr().out
    key = "gtsrb test_resnet"
    erm, budget = (
        [run["nll"] for run in found if (run["setting"], run["row"]) == (key, row)]
        for row in ("ERM", "budget 1.15")
    )
    assert f"| {sum(erm) / 2:.3f} ± " in out
    gains = [b - a for a, b in zip(erm, budget)]
    assert f"<br>{sum(gains) / 2:+.3f} ± ".replace("-", "−") in out
    assert (tmp_path / "erm_comparison_grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_recipe_is_tested_on_corrupted_images_too(tmp_path, monkeypatch, capsys):
    folder = parquet_folder(tmp_path / "gtsrb", train=33, test=20)
    for name in plan.CORRUPTIONS:
        rows(200, 220).to_parquet(f"{folder}/data/{name}-00000-of-00001.parquet")
    key = "gtsrb recipe"
    setting = dataclasses.replace(erm_comparison.SETTINGS[key], network="test_resnet", epochs=1)
    monkeypatch.setitem(erm_comparison.SETTINGS, key, setting)
    words = ["--data", tmp_path, "--output", tmp_path / "out.json", "--tables", "recipes"]
    words += ["--settings", key, "--rows", "ERM", "--seeds", 0]
    main_of(erm_comparison, monkeypatch, *words)
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [*run["corruptions"]] == [*plan.CORRUPTIONS]
    assert run["corrupted"] == pytest.approx(sum(run["corruptions"].values()) / 7)
    assert f"| ERM | {100 * run['accuracy']:.2f} | " in (out := capsys.readouterr().out)
    assert f" | {100 * run['corrupted']:.1f} | 1 |" in out


def test_a_copy_without_corrupted_images_leaves_out_the_recipe_and_says_so(
    tmp_path, monkeypatch, capsys
):
    parquet_folder(tmp_path / "gtsrb", train=33, test=20)
    (tmp_path / "cifar10").mkdir()
    words = ["--data", tmp_path, "--output", tmp_path / "out.json", "--tables", "recipes"]
    remedy = "has no corrupted test splits. Make a copy that has them with recipes/measurements/"
    error = error_of(erm_comparison, monkeypatch, *words, "--settings", "gtsrb recipe")
    assert remedy in error
    main_of(erm_comparison, monkeypatch, *words, "--rows", "AMP", "--seeds", 0)
    assert f"gtsrb recipe: left out. {tmp_path}/gtsrb {remedy}" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["texts minilm", "texts lora", "texts language model"])
def test_the_comparison_trains_on_texts(tmp_path, monkeypatch, key):
    csv_folder(tmp_path / "debian_sections")
    save_encoder(tmp_path / "all-MiniLM-L6-v2")
    setting = erm_comparison.SETTINGS[key]
    setting = dataclasses.replace(setting, epochs=2, argv=f"{setting.argv} --label_column module")
    monkeypatch.setitem(erm_comparison.SETTINGS, key, setting)
    words = ["--data", tmp_path, "--output", tmp_path / "out.json", "--tables", "defaults"]
    words += ["--settings", key, "--rows", "ERM", "--seeds", 0]
    main_of(erm_comparison, monkeypatch, *words)
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert run["nll"] < math.log(3 if setting.job is TextJob else 259)  # a guess's
    assert str(tmp_path) not in run["command"]


def test_every_byte_but_the_first_is_predicted_from_those_before_it():
    texts = EvalPrediction(
        torch.arange(2 * 4 * 3).reshape(2, 4, 3).numpy(),
        torch.tensor([[7, 1, 2, 0], [7, 2, -100, -100]]).numpy(),
    )
    found = language_model.predicted_tokens(texts)
    assert found.label_ids.tolist() == [1, 2, 0, 2]
    assert found.predictions[:, 0].tolist() == [0, 3, 6, 12]


def test_the_tables_of_the_comparison_are_those_of_its_results():
    found = saved_runs(erm_comparison)
    for table in erm_comparison.TO_PRINT:
        assert table(found) in documented()
    on_a_gpu = saved_runs(erm_comparison, machine="_gpu")
    assert erm_comparison.recipes_table(on_a_gpu) in documented()
    for key, tried in erm_comparison.TRIED.items():
        accuracy = {
            epsilon: found.values(key, erm_settings.held_out(epsilon), "accuracy")[0]
            for epsilon in tried
        }
        assert erm_comparison.SETTINGS[key].epsilon == max(accuracy, key=accuracy.get)

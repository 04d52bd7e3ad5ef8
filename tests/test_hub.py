"""Pushes over real HTTP: the real client, against a server that speaks the Hub's protocol."""

import inspect
import json
import logging
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import hub_worker
import huggingface_hub.constants
import pytest
import safetensors.torch
from hub_server import Hub, use
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from images import parquet_folder, rows
from processes import on_ranks
from scripts import RECIPES, run_here
from support import MLP, always, differing, make, on, trainer_for, weights
from transformers import Trainer
from transformers.utils import PushInProgress

from amp_hf import AMPConfig, AMPTrainer
from amp_hf.images.classification import main
from amp_hf.job import comparison
from amp_hf.job.pushing import HubError
from amp_hf.job.recipe_trainer import RecipeTrainer

SMALL = "--model test_resnet --from_scratch --image_size 24 --use_cpu --num_train_epochs 1"
REPO = "someone/digits"


@pytest.fixture
def hub(monkeypatch):
    """One that this process's client knows, too."""
    with Hub() as hub:
        use(hub.endpoint, monkeypatch)
        yield hub


def pushing(folder, hub, **kwargs):
    own = dict(push_to_hub=True, hub_model_id=REPO, hub_token=hub.token, max_steps=4)
    trainer = trainer_for(make(MLP), folder, **dict(cls=RecipeTrainer) | own | kwargs)

    def wait(event, state, control):
        """Steps here are shorter than a push, which must not see the next one's files."""
        if trainer.push_in_progress is not None:
            trainer.push_in_progress.wait_until_done()

    trainer.add_callback(on(["on_save"], wait))
    return trainer


def pushes(hub, **kwargs):
    """What a training and the pushes after it ask of an empty Hub: the requests, the commits."""
    hub.repos.clear()
    hub.objects.clear()
    hub.requests.clear()
    trainer = pushing("out", hub, hub_always_push=True, save_strategy="steps", save_steps=2,
                      **kwargs)  # fmt: skip
    trainer.train()
    trainer.save_model()  # which is a push, too
    trainer.push_to_hub()
    requests = Counter(
        (method, re.sub("^/lfs/.*", "/lfs/", path), token)
        for method, path, token in hub.requests
        if path != "/api/agent-harnesses"  # asked once per process
    )
    return requests, hub.repos[REPO].branches["main"]


def recipe(monkeypatch, folder, data, *words):
    words = ["--dataset", data, "--output_dir", folder / "out", *words]
    push = ["--push_to_hub", "--hub_model_id", REPO]
    run_here(RECIPES / "train_cifar10.py", monkeypatch, *SMALL.split(), *words, *push)


LOAD = """
import sys
sys.modules["amp_hf"] = None  # as if it were not installed
import huggingface_hub.constants
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
repo, revision, folder, picture, trust = sys.argv[1:]
code = {"trust_remote_code": trust == "True"}
try:
    AutoModelForImageClassification.from_pretrained(repo, revision=revision, token=False, **code)
except OSError as error:  # a stranger's
    print(str(error).splitlines()[0])
for source, revision in ((repo, revision), (folder, "main")):
    model = AutoModelForImageClassification.from_pretrained(source, revision=revision, **code)
    processor = AutoImageProcessor.from_pretrained(source, revision=revision)
    logits = model(**processor(Image.open(picture).convert("RGB"))).logits
    predict = pipeline("image-classification", model=source, revision=revision, **code)
    print(logits.tolist(), predict(picture, top_k=1)[0]["label"])
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the folder needs no Hub
"""


SMALL_PREACT = [
    "--model=preactresnet18",
    '--model_args={"channels": [8, 8, 8, 8], "stem_chs": 8}',
    *("--save_strategy=epoch", "--hub_strategy=every_save", "--hub_always_push=true"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "code"), [([], False), (SMALL_PREACT, True)])
def test_a_pushed_model_is_loaded_by_a_process_that_has_the_hub_alone(
    tmp_path, hub, monkeypatch, capsys, model, code
):
    data = parquet_folder(tmp_path / "data", train=64, test=32)
    picture = tmp_path / "one.png"
    rows(300, 301)[0]["img"].save(picture)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    branch = ["--hub_private_repo", "true", "--hub_revision", "flat"]
    recipe(monkeypatch, tmp_path, data, *branch, *model)
    trust = ", trust_remote_code=True" if code else ""
    assert f'/out"{trust})' in capsys.readouterr().out
    assert hub.private(REPO)
    assert hub.commits(REPO, "flat")[-1] == "End of training"
    assert hub.commits(REPO) == ["initial commit"]
    files = hub.files(REPO, "flat")
    assert {"model.safetensors", "config.json", "README.md", "amp_config.json"} <= files.keys()
    card = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False)
    source = f'"{REPO}", revision="flat"'
    assert f'pipeline("image-classification", model={source}{trust})' in card.text
    first_push = hub.repos[REPO].branches["flat"][1].files
    assert ("models.py" in files) == ("models.py" in first_push) == code
    assert hub.commits(REPO, "flat")[1] == "Training in progress, epoch 1" or not code
    assert card.data.eval_results and str(tmp_path) not in card.content
    assert hub.cards[-1] == card.content  # what the Hub was asked to validate

    command = [sys.executable, "-c", LOAD, REPO, "flat", tmp_path / "out", picture, code]
    env = hub.environment(tmp_path / "another home")
    done = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    refused, pushed, saved = done.stdout.splitlines()
    assert "not a valid model identifier" in refused
    assert pushed == saved


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_hub_strategy_pushes_what_it_says(tmp_path, hub, strategy):
    trainer = pushing(
        tmp_path, hub, hub_strategy=strategy, hub_always_push=True, save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    files, titles = hub.files(REPO), hub.commits(REPO)
    assert titles[-1] == "End of training"
    assert ("Training in progress, step 2" in titles) == (strategy != "end")
    in_between = hub.repos[REPO].branches["main"][1].files
    assert "## Cost" in in_between["README.md"].decode()
    assert "amp_config.json" in in_between
    checkpoints = {path.partition("/")[0] for path in files if path.endswith("optimizer.pt")}
    assert (
        checkpoints
        == {
            "end": set(),
            "every_save": set(),
            "checkpoint": {"last-checkpoint"},
            "all_checkpoints": {"checkpoint-2", "checkpoint-4"},
        }[strategy]
    )
    assert files["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert "adversarial-model-perturbation" in ModelCard(files["README.md"].decode()).data.tags


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("strategy", ["end", "every_save", "all_checkpoints"])
def test_an_amp_trainer_pushes_as_the_stock_trainer_does(
    tmp_path, monkeypatch, hub, strategy, epsilon
):
    """The same requests and the same files, but for the AMPConfig and what the card says."""
    pushed = []
    for own in (dict(cls=Trainer), dict(cls=AMPTrainer, config=always(epsilon=epsilon))):
        folder = tmp_path / own["cls"].__name__
        folder.mkdir()
        monkeypatch.chdir(folder)  # where the output folders can have one name
        pushed.append(pushes(hub, hub_strategy=strategy, **own))
    (stock_requests, stock_commits), (requests, commits) = pushed
    assert requests == stock_requests
    for stock, commit in zip(stock_commits, commits, strict=True):
        assert commit.title == stock.title
        own = {path for path in commit.files if Path(path).name == "amp_config.json"}
        assert commit.files.keys() - own == stock.files.keys()
        changed = {path for path in stock.files if commit.files[path] != stock.files[path]}
        if epsilon == 0:
            assert {Path(path).name for path in changed} <= {"README.md", "trainer_state.json"}
    assert b"## Cost" in commit.files["README.md"] and b"## Cost" not in stock.files["README.md"]


@pytest.mark.parametrize("status", [401, 500])
def test_an_amp_trainer_fails_to_push_as_the_stock_trainer_does(tmp_path, hub, status):
    """Where the repository cannot be made, and where the commit is refused."""

    def failure(request, act, *args, **kwargs):
        hub.fail(request, status)
        with pytest.raises(HfHubHTTPError) as raised:
            act(*args, **kwargs)
        hub.faults.clear()
        return type(raised.value), str(raised.value)

    failures = []
    for cls in (Trainer, AMPTrainer):
        hub.repos.clear()
        created = failure("POST /api/repos/create", pushing, tmp_path, hub, cls=cls)
        trainer = pushing(tmp_path, hub, cls=cls)
        failures.append((created, failure("POST /api/models/.*/commit/", trainer.push_to_hub)))
    assert failures[0] == failures[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_push_once(tmp_path, hub):
    on_ranks(hub_worker.push, hub.endpoint, tmp_path, REPO)
    assert hub.commits(REPO).count("End of training") == 1
    assert "README.md" in hub.files(REPO)


FAILURES = {
    "401": ("POST /api/models/.*/commit/", 401, "401 Unauthorized (the token is missing"),
    "403": ("POST /api/models/.*/commit/", 403, "403 Forbidden (the token may not write there)"),
    "404": ("POST /api/models/.*/preupload/", 404, "404 Not Found (there is no such repository"),
    "409": ("POST /api/models/.*/commit/", 409, "409 Conflict (somebody else changed"),
    "429": ("POST /api/models/.*/commit/", 429, "429 Too Many Requests (the Hub got too many"),
    "a proxy's own code": ("POST /api/models/.*/commit/", 520, "520"),
    "500": ("POST /api/models/.*/commit/", 500, "500 Internal Server Error (Internal Error - We'"),
    "upload refused": ("PUT /lfs/", 403, "403 Forbidden"),
    "dropped": ("POST /api/models/.*/commit/", None, "RemoteProtocolError: Server disconnected"),
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_when_a_push_fails_the_model_is_safe_and_one_command_pushes_it(tmp_path, hub, failure):
    match, status, said = FAILURES[failure]
    trainer = pushing(tmp_path / "my model", hub)
    trainer.train()
    hub.fail(match, status) if status else hub.drop(match)
    with pytest.raises(HubError) as raised:
        trainer.push_to_hub()
    message = str(raised.value)
    (line,) = message.splitlines()
    assert line.startswith(f"The push to {REPO} failed: {said}")
    assert f"The model is safe in {tmp_path / 'my model'}; this pushes it again, after" in line
    assert hub.token not in "".join(traceback.format_exception(raised.value))
    saved = safetensors.torch.load_file(tmp_path / "my model" / "model.safetensors")
    assert differing(saved, weights(trainer.model)) == []
    assert "model.safetensors" not in hub.files(REPO)

    hub.faults.clear()
    command = shlex.split(message.rpartition("login`: ")[2])
    command[0] = str(Path(sys.executable).with_name("hf"))
    assert "after `hf auth login`: hf upload" in message
    env = hub.environment(tmp_path / "home")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert safetensors.torch.load(hub.files(REPO)["model.safetensors"]).keys() == saved.keys()


def test_a_connection_that_is_dropped_amid_the_weights_loses_nothing(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's, 23 seconds in all
    trainer = pushing(tmp_path, hub)
    trainer.train()
    hub.drop("PUT /lfs/")
    with pytest.raises(HubError, match="failed: RuntimeError: Error while uploading") as raised:
        trainer.push_to_hub()
    assert "hf upload" in str(raised.value)
    hub.faults.clear()
    trainer.push_to_hub()  # and the same trainer can do it, too
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_a_push_that_was_not_asked_for_at_the_start_saves_first(tmp_path, hub):
    trainer = pushing(tmp_path, hub, push_to_hub=False)
    trainer.train()
    assert not (tmp_path / "model.safetensors").exists()
    hub.fail("POST /api/repos/create", 403)
    # Older Trainers do not take it.
    takes = "private" in inspect.signature(Trainer.push_to_hub).parameters
    private = {"private": True} if takes else {}
    with pytest.raises(HubError, match="403 Forbidden") as raised:
        trainer.push_to_hub(revision="v2", **private)
    assert (tmp_path / "model.safetensors").exists()
    assert str(raised.value).endswith("--exclude '_*' --revision v2" + " --private" * takes)
    hub.faults.clear()
    trainer.push_to_hub(revision="v2", **private)
    assert hub.private(REPO) == takes and "model.safetensors" in hub.files(REPO, "v2")


def test_a_push_leaves_nothing_of_an_earlier_model_that_loads_with_the_new_one(tmp_path, hub):
    pushing(tmp_path / "out", hub).push_to_hub()
    files = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"",
        "test_results.json": b"{}",
        "checkpoint-5/config.json": b"{}",
        "notes.md": b"A user's own.",
    }
    before = hub.files(REPO)
    hub.repos[REPO].add("main", "adapters", before | files, set())
    pushing(tmp_path / "again", hub).push_to_hub()
    kept = {"checkpoint-5/config.json", "notes.md"}
    assert set(hub.files(REPO)) == {*before, *kept}
    assert hub.commits(REPO)[-1] == "Delete what an earlier model left"


def test_a_saved_model_is_pushed_with_its_config_which_a_failing_push_does_not_keep_back(
    tmp_path, hub
):
    trainer = pushing(tmp_path / "out", hub)
    trainer.train()
    trainer.amp_config = AMPConfig(0.2)
    trainer.save_model()
    assert hub.commits(REPO)[-1] == "Model save"
    assert json.loads(hub.files(REPO)["amp_config.json"]) == trainer.amp_config.to_dict()
    hub.fail("POST /api/models/.*/commit/", 403)
    trainer.amp_config = AMPConfig(0.3)
    with pytest.raises(Exception, match="403 Forbidden"):
        trainer.save_model(tmp_path / "elsewhere")
    assert AMPConfig.from_json_file(tmp_path / "elsewhere" / "amp_config.json").epsilon == 0.3


def test_a_push_in_the_background_that_fails_is_reported(tmp_path, hub, caplog):
    trainer = pushing(tmp_path, hub)
    trainer.train()
    hub.fail("POST /api/models/.*/commit/", 500)
    push = trainer.push_to_hub(blocking=False)
    assert push.exception() is not None
    deadline = time.monotonic() + 10
    while not caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)  # its callbacks follow
    assert "failed: 500 Internal Server Error" in caplog.text


def test_a_push_that_fails_amid_the_training_is_reported_and_the_training_goes_on(
    tmp_path, hub, caplog
):
    hub.fail("POST /api/models/.*/commit/", 403, times=1)
    trainer = pushing(
        tmp_path, hub, hub_strategy="every_save", hub_always_push=True, save_strategy="steps",
        save_steps=1,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    (record,) = [record for record in caplog.records if record.name == "amp_hf.job.pushing"]
    assert f"A push to {REPO} failed: 403 Forbidden" in record.message
    assert "hf upload" in record.message


def test_what_an_upload_still_reads_stays_as_it_is(tmp_path, hub):
    trainer = pushing(tmp_path / "out", hub, hub_strategy="every_save")
    trainer.save_model(tmp_path / "checkpoint", _internal_call=True)
    trainer.state.epoch = 1.0  # as amid a training
    trainer.push_in_progress = PushInProgress([Future()])
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint"))
    assert not (tmp_path / "out" / "README.md").exists()
    trainer.push_in_progress.jobs[0].set_result(None)
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint"))
    trainer.push_in_progress.wait_until_done()
    assert "README.md" in hub.files(REPO)


def test_a_pull_request_is_pushed_to_and_no_branch_is_made_for_it(tmp_path, hub):
    trainer = pushing(tmp_path, hub, hub_revision="refs/pr/1")
    trainer._ensure_branch("mine", None)
    made = [path for method, path, _ in hub.requests if "/branch/" in path]
    assert trainer.hub_model_id == REPO and len(made) == 1 and made[0].endswith("/branch/mine")


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_refuses_at_the_start_is_told_of_before_anything_is_trained(
    tmp_path, hub, status
):
    hub.fail("POST /api/repos/create", status)
    with pytest.raises(HubError, match=rf"^Repository {REPO} cannot be pushed to: {status} .*push"):
        pushing(tmp_path, hub)


@pytest.mark.slow
def test_a_recipe_ends_with_one_line_when_the_token_is_missing_or_the_push_fails(
    tmp_path, hub, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    data = parquet_folder(tmp_path / "data", train=32, test=32)
    with pytest.raises(SystemExit) as exit:
        recipe(monkeypatch, tmp_path, data)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert "cannot be pushed to: 401 Unauthorized (the token is missing" in line
    assert "Traceback" not in err
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.fail("POST /api/models/.*/commit/", 500)
    with pytest.raises(SystemExit) as exit:
        recipe(monkeypatch, tmp_path, data)
    assert exit.value.code == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "train_cifar10.py: error: The push to someone/digits failed: 500 " in err
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "test_accuracy" in (tmp_path / "out" / "all_results.json").read_text()
    assert "## Results" in (tmp_path / "out" / "README.md").read_text()
    assert hub.token not in err + out


@pytest.mark.slow
def test_what_cannot_be_measured_for_the_card_keeps_no_model_from_the_hub(
    tmp_path, hub, monkeypatch, capsys
):
    data = parquet_folder(tmp_path / "data", train=32, test=32)
    error = RuntimeError("derivative for aten::something is not implemented")
    monkeypatch.setattr(comparison.LossSurface, "trace", lambda *_: raise_(error))
    words = [*SMALL.split(), f"--dataset={data}", f"--output_dir={tmp_path / 'out'}", "--flatness"]
    words += ["--push_to_hub", f"--hub_model_id={REPO}", f"--hub_token={hub.token}"]
    with pytest.raises(RuntimeError, match="aten::something"):
        main(argv=words)
    assert "lacks what could not be measured: derivative for aten" in capsys.readouterr().err
    assert "## Results" in hub.files(REPO)["README.md"].decode()
    assert "model.safetensors" in hub.files(REPO)


def raise_(error):
    raise error


@pytest.mark.slow
def test_a_model_that_diverged_replaces_none_on_the_hub(tmp_path, hub, capsys):
    data = parquet_folder(tmp_path / "data", train=32, test=32)
    words = [*SMALL.split(), f"--dataset={data}", f"--output_dir={tmp_path / 'out'}"]
    words += [
        "--push_to_hub",
        "--hub_strategy=end",
        f"--hub_model_id={REPO}",
        f"--hub_token={hub.token}",
    ]
    main(argv=words)
    good = hub.files(REPO)["model.safetensors"]
    with pytest.raises(SystemExit) as exit:
        main(argv=[*words, "--learning_rate=1e30", "--num_train_epochs=3"])
    assert exit.value.code == 1 and "The training diverged" in capsys.readouterr().err
    assert hub.files(REPO)["model.safetensors"] == good


def test_the_token_is_in_no_file_and_no_log(tmp_path, hub, caplog, capfd):
    trainer = pushing(
        tmp_path, hub, hub_strategy="all_checkpoints", save_strategy="steps", save_steps=2,
        report_to="tensorboard",
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    secret = hub.token.encode()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert [path for path in written if secret in path.read_bytes()] == []
    assert [path for path, content in hub.files(REPO).items() if secret in content] == []
    out, err = capfd.readouterr()
    assert hub.token not in out + err + caplog.text + repr(trainer.args) + str(trainer.args)
    assert trainer.args.hub_token == hub.token  # it still pushes with it


def test_weights_are_pushed_as_safetensors_alone(tmp_path, hub):
    trainer = pushing(tmp_path, hub)
    trainer.train()
    trainer.push_to_hub()
    names = {Path(path).suffix for path in hub.files(REPO)} - {"", ".json", ".md"}
    assert names == {".safetensors", ".bin"}  # the latter are the Trainer's arguments
    assert [p for p in hub.files(REPO) if p.endswith(".bin")] == ["training_args.bin"]

"""The model card, as the Trainer writes it: valid metadata, and text that says what was done."""

import ast
import itertools
import re
from urllib.parse import quote, unquote

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from support import (
    MLP,
    always,
    digits,
    language_model,
    make,
    on,
    padded,
    strokes,
    train_language_model,
    trainer_for,
)
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, Trainer

from amp_hf import AMPConfig, AMPTrainer, AMPTrainerMixin
from amp_hf.card import _duration
from amp_hf.flatness import Eigenvalue, Flatness, Rise, Trace

FLATNESS = Flatness(
    samples=200,
    seed=0,
    loss=0.01,
    radius=0.1,
    worst_case_rise=0.1794,
    scale=0.2,
    random_rise=Rise(0.05, 0.02, [0.03, 0.07]),
    top_eigenvalue=Eigenvalue(12.5, 0.1, 9, True),
    trace=Trace(80.0, 3.0, [77.0, 83.0]),
)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def trained(folder, config=None, cls=AMPTrainer, **kwargs):
    trainer = trainer_for(
        make(MLP), folder, config, cls=cls, trainer={"compute_metrics": accuracy}, **kwargs
    )
    trainer.train()
    for split in ("eval", "test"):
        trainer.evaluate(digits()[:50], metric_key_prefix=split)
    return trainer


def card_of(trainer, **kwargs):
    trainer.create_model_card(**kwargs)
    # Raises where the metadata are not what the Hub takes.
    return ModelCard.load(f"{trainer.args.output_dir}/README.md", ignore_metadata_errors=False)


def test_the_card_says_how_the_model_was_trained_and_what_came_of_it(tmp_path):
    config = AMPConfig(0.25, ascent_start=0.5, ascent_every=2)
    trainer = trained(tmp_path / "flat-digits", config, max_steps=8)
    text = card_of(trainer).text
    assert "More information needed" not in text
    assert text.strip().startswith("# flat-digits\n")
    assert "Adversarial Model Perturbation (AMP; nothing to do with mixed precision)" in text
    assert "| `epsilon` | `0.25` |" in text and "| `learning_rate` | `0.1` |" in text
    assert "| `optimizer` | `SGD` |" in text
    cost = (
        "2 of 8 steps had an ascent, a further forward and backward pass. ‖Δ‖₂ was 0.25 on average."
    )
    assert cost in text
    assert "| `weight_decay` | `0.0` |" in text and "| `max_grad_norm` | `0.0` |" in text
    accuracy = trainer.state.log_history[-1]["test_accuracy"]
    assert f"| test: accuracy | {accuracy:.2%} |" in text
    assert "booktitle = {Proceedings of the IEEE/CVF" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text


def test_the_results_are_in_the_metadata(tmp_path):
    trainer = trained(tmp_path)
    trainer.card_details.dataset = "mnist/digits"
    trainer.card_details.base_model = "someone/base"
    trainer.card_details.license = "Apache-2.0"
    trainer.card_details.dataset_config = "small"
    card = card_of(trainer, tasks="image-classification", tags=["mine"])
    assert "[mnist/digits](https://huggingface.co/datasets/mnist/digits) (small)" in card.text
    data = card.data
    assert {result.dataset_config for result in data.eval_results} == {"small"}
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.datasets == ["mnist/digits"]
    assert data.base_model == "someone/base"
    assert {"mine", "amp_hf", "adversarial-model-perturbation"} <= set(data.tags)
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in data.eval_results}
    log = trainer.state.log_history[-1]
    assert found["test", "accuracy"] == log["test_accuracy"]
    assert found["eval", "loss"] == trainer.state.log_history[-2]["eval_loss"]


def test_the_baseline_and_the_flatness_stand_beside_the_model(tmp_path):
    trainer = trained(tmp_path)
    trainer.card_details.baseline = {"test": {"accuracy": 0.5, "loss": 2.0}}
    trainer.card_details.baseline_seconds = 1e-3
    trainer.card_details.flatness = {"AMP": FLATNESS, "ERM": FLATNESS}
    trainer.card_details.pictures = {"A picture": "loss_curves.png"}
    text = card_of(trainer).text
    assert "|  | AMP | ERM |" in text
    assert re.search(r"\| test: accuracy \| \d+\.\d\d% \| 50\.00% \|", text)
    assert re.search(r"\| eval: accuracy \| \d+\.\d\d% \|  \|", text)
    assert "| rise of the loss, worst found within 0.1 of the weights | 0.1794 | 0.1794 |" in text
    assert "| trace of the Hessian, ± standard error | 80 ± 3 | 80 ± 3 |" in text
    seconds = trainer.state.log_history[-3]["train_runtime"]
    assert f"{seconds / 1e-3:.2f} times what ERM took on the same machine (0.0 s)" in text
    assert "![A picture](loss_curves.png)" in text


def test_without_perturbation_the_card_claims_none(tmp_path):
    card = card_of(trained(tmp_path, AMPConfig(epsilon=0)))
    assert "without any perturbation" in card.text
    assert "0 of 8 steps had an ascent." in card.text
    assert "adversarial-model-perturbation" not in card.data.tags


def test_a_diverged_model_has_a_valid_card_too(tmp_path):
    trainer = trained(tmp_path)
    trainer.state.log_history[-1]["test_loss"] = float("nan")
    card = card_of(trainer)
    assert "| test: loss | nan |" in card.text
    assert {r.metric_type for r in card.data.eval_results if r.dataset_split == "test"} == {
        "accuracy"
    }


def test_a_subclass_that_writes_a_card_of_its_own_keeps_its_text(tmp_path):
    class OwnCard(Trainer):
        def create_model_card(self, model_name=None):
            text = "---\ntags: [own]\n---\n# Mine\n\nTrained by a method of my own.\n"
            (tmp_path / "README.md").write_text(text)

    class Mixed(AMPTrainerMixin, OwnCard):
        pass

    card = card_of(trained(tmp_path, cls=Mixed), model_name="x")
    assert "Trained by a method of my own." in card.text
    assert "## Cost" in card.text
    assert "amp_hf" in card.data.tags and "own" in card.data.tags
    assert card.text.count("\n# ") == 1


def test_a_card_can_be_written_before_the_training_and_after_it_again(tmp_path):
    trainer = trainer_for(make(MLP), tmp_path, AMPConfig(0.1, ascent_start=0.75))
    assert "0 of 0 steps" in card_of(trainer).text
    trainer.train()
    assert card_of(trainer).text.count("## Cost") == 1
    assert "2 of 8 steps" in card_of(trainer).text
    assert "This model was trained with Adversarial" in card_of(trainer).text


def test_steps_that_reuse_a_perturbation_are_counted_apart(tmp_path):
    config = AMPConfig(0.1, ascent_start=0.5, ascent_every=4, ascent_reuse=True)
    text = card_of(trained(tmp_path, config, max_steps=8)).text
    assert "1 of 8 steps had an ascent, a further forward and backward pass; 3 more reused" in text


def stopping(folder, first_step):
    """Learns too fast, and stops where that does not get better: the best model is loaded."""
    trainer = trainer_for(
        make(MLP),
        folder,
        AMPConfig(0.1, ascent_start=first_step / 40),
        data=digits()[:200],
        max_steps=40,
        learning_rate=3.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        trainer={"eval_dataset": digits()[200:300], "callbacks": [EarlyStoppingCallback(2)]},
    )
    trainer.train()
    return trainer


def test_of_the_best_model_the_results_are_its_own(tmp_path):
    trainer = stopping(tmp_path, 0)
    assert trainer.state.best_global_step < trainer.state.global_step
    card = card_of(trainer)
    (result,) = (r for r in card.data.eval_results if r.metric_type == "loss")
    assert result.metric_value == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert f"The model is that of step {trainer.state.best_global_step}, the best" in card.text
    trainer.evaluate(digits()[:50])
    (result,) = (r for r in card_of(trainer).data.eval_results if r.metric_type == "loss")
    assert result.metric_value == trainer.state.log_history[-1]["eval_loss"]


def test_an_evaluation_of_the_training_set_does_not_end_the_training(tmp_path):
    trainer = stopping(tmp_path, 0)
    trainer.evaluate(digits()[:50], metric_key_prefix="train")
    log = trainer.state.log_history
    log.insert(0, log.pop())  # as a callback would have logged it in an early epoch
    card = card_of(trainer)
    (result,) = (r for r in card.data.eval_results if r.metric_type == "loss")
    assert result.metric_value == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    (seconds,) = (entry["train_runtime"] for entry in log if "total_flos" in entry)
    assert f"Training took {seconds:.1f} s" in card.text


def test_a_schedule_that_ends_at_zero_leaves_a_model_of_amp(tmp_path):
    def end(event, state, control):
        if state.global_step == 6:
            trainer.amp_config = AMPConfig(epsilon=0)

    trainer = trainer_for(make(MLP), tmp_path, always(), max_steps=8)
    trainer.add_callback(on(["on_step_end"], end))
    trainer.train()
    trainer.evaluate(digits()[:50])
    text = card_of(trainer).text
    assert "6 of 8 steps had an ascent" in text
    assert "|  | AMP |" in text and "| `ball` | `global` |" in text


def test_a_step_that_was_not_taken_is_not_counted(tmp_path):
    def stop(event, state, control):
        control.should_training_stop = state.global_step == 3

    options = dict(max_steps=8, gradient_accumulation_steps=2)
    trainer = trainer_for(make(MLP), tmp_path, always(), **options)
    trainer.add_callback(on(["on_substep_end"], stop))
    trainer.train()
    assert "3 of 3 steps had an ascent" in card_of(trainer).text


def test_speeds_in_the_trainings_logs_are_no_results(tmp_path):
    trainer = train_language_model(
        tmp_path, always(), logging_steps=1, include_num_input_tokens_seen="all"
    )
    assert any("train_runtime" in log and "loss" in log for log in trainer.state.log_history)
    trainer.evaluate(strokes()[:4])
    assert [result.dataset_split for result in card_of(trainer).data.eval_results] == ["eval"]


def test_speeds_in_the_trainings_logs_do_not_shorten_the_table_of_evaluations(tmp_path):
    trainer = trainer_for(
        make(language_model),
        tmp_path,
        data=strokes(),
        trainer={"data_collator": padded, "eval_dataset": strokes()[:4]},
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        include_num_input_tokens_seen="all",
    )
    trainer.train()
    text = card_of(trainer).text
    rows = text[text.index("| Training Loss |") :].split("\n\n")[0].splitlines()[2:]
    assert len(rows) == trainer.state.global_step == 4


def test_a_training_that_stops_before_the_first_ascent_says_so(tmp_path, caplog):
    trainer = stopping(tmp_path, 34)
    card = card_of(trainer)
    assert "no step that led to this model was perturbed" in card.text
    assert "adversarial-model-perturbation" not in card.data.tags
    assert "before the first perturbed one: AMPConfig.ascent_start=0.85" in caplog.text


def test_a_training_of_no_steps_is_not_told_to_begin_earlier(tmp_path, caplog):
    trainer_for(make(MLP), tmp_path, always(), max_steps=-1, num_train_epochs=0).train()
    assert "perturbed" not in caplog.text


def test_a_best_model_from_before_the_first_ascent_is_not_called_perturbed(tmp_path, caplog):
    best = stopping(tmp_path / "a", 0).state.best_global_step
    trainer = stopping(tmp_path / "b", best)
    assert trainer.state.best_global_step == best < trainer.state.global_step
    assert "no step that led to this model was perturbed" in card_of(trainer).text
    assert "before the first perturbed one" not in caplog.text


def test_a_resumed_training_has_no_time_because_only_a_part_was_measured(tmp_path):
    config = AMPConfig(0.1, ascent_start=0.75)
    trained(tmp_path, config, save_strategy="steps", save_steps=7)
    trainer = trainer_for(make(MLP), tmp_path, config)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    text = card_of(trainer).text
    assert "2 of 8 steps had an ascent" in text and "Training took" not in text


def test_metrics_of_any_kind_and_a_baseline_that_lacks_some_do_not_stop_the_card(tmp_path):
    trainer = trained(tmp_path)
    trainer.state.log_history[-1] |= {"test_confusion": [[1, 2]], "test_best": "seven"}
    trainer.card_details.baseline = {"test": {"accuracy": 0.5}}
    assert re.search(r"\| test: loss \| [\d.]+ \|  \|", card_of(trainer).text)


def test_a_module_without_a_config_has_a_card(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = MLP()

        def forward(self, pixels, labels=None):
            return self.network(pixels, labels)

    trainer = trainer_for(make(Plain), tmp_path, data=digits())
    trainer.train()
    assert "This model was trained with Adversarial Model Perturbation" in card_of(trainer).text


@pytest.mark.parametrize(
    ("dataset", "listed"), [("a/b", ["a/b"]), ("my data", None), ("Zahlen (alt)", None)]
)
def test_only_what_can_be_on_the_hub_is_named_as_a_dataset(tmp_path, dataset, listed):
    trainer = trained(tmp_path)
    trainer.card_details.dataset = dataset
    card = card_of(trainer)
    assert card.data.datasets == listed
    assert card.data.eval_results[0].dataset_name == dataset
    assert dataset in card.text


def test_an_optimizer_of_the_scripts_own_is_the_one_on_the_card(tmp_path):
    model = make(MLP)
    own = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    trainer = trainer_for(model, tmp_path, trainer={"optimizers": (own, None)})
    trainer.train()
    text = card_of(trainer).text
    for row in (
        "optimizer` | `SGD(momentum=0.9)",
        "learning_rate` | `0.3",
        "weight_decay` | `0.01",
    ):
        assert f"| `{row}` |" in text
    assert "adam" not in text


def test_what_an_optimizer_keeps_in_its_groups_does_not_stop_the_card(tmp_path):
    model = make(MLP)
    own = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    own.param_groups[0] |= {"mask": torch.ones(3), "scales": np.ones(2)}
    trainer = trainer_for(model, tmp_path, trainer={"optimizers": (own, None)})
    trainer.train()
    assert "| `optimizer` | `SGD(momentum=0.9)` |" in card_of(trainer).text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(59.94, "59.9 s"), (59.96, "1 min 0 s"), (119.6, "2 min 0 s"), (3599.7, "1 h 0 min")],
)
def test_a_duration_has_no_sixty_seconds(seconds, shown):
    assert _duration(seconds) == shown


def test_small_metrics_are_not_shown_as_zero(tmp_path):
    trainer = trained(tmp_path)
    trainer.state.log_history[-1]["test_mse"] = 3e-5
    assert "| test: mse | 3e-05 |" in card_of(trainer).text


def test_the_name_of_the_model_may_be_given_by_its_place(tmp_path):
    trainer = trained(tmp_path)
    trainer.create_model_card("en", "mit", ["t"], "my-name")
    card = ModelCard.load(f"{trainer.args.output_dir}/README.md", ignore_metadata_errors=False)
    assert card.data.model_name == "my-name" and "\n# my-name\n" in card.text


@pytest.mark.parametrize("dataset", ["a/b", ["a/b", "c/d"]])
def test_the_datasets_that_create_model_card_is_told_of_are_named(tmp_path, dataset):
    card = card_of(trained(tmp_path), dataset=dataset)
    names = [dataset] if isinstance(dataset, str) else dataset
    assert card.data.datasets == names
    assert card.data.eval_results[0].dataset_name == ", ".join(names)
    assert all(name in card.text for name in names)


def test_the_tags_of_a_dataset_are_its_metadata_and_not_its_name(tmp_path):
    card = card_of(trained(tmp_path), dataset_tags="a/b", dataset="AB")
    assert card.data.datasets == ["a/b"]
    assert {result.dataset_type for result in card.data.eval_results} == {"a/b"}


def test_a_resumed_training_has_the_batch_size_that_it_took(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    seen = []
    for size, resumed in ((8, {}), (16, {"resume_from_checkpoint": f"{tmp_path}/checkpoint-2"})):
        model = make(MLP)
        model.register_forward_pre_hook(
            lambda _, args, inputs: seen.append(len(inputs["pixels"])), with_kwargs=True
        )
        trainer = trainer_for(model, tmp_path, per_device_train_batch_size=size, **options)
        trainer.train(**resumed)
    # Up to some version, the Trainer goes on with the checkpoint's.
    assert f"| `train_batch_size` | `{seen[-1]}` |" in card_of(trainer).text


def test_a_license_that_the_hub_does_not_list_is_named_beside_other(tmp_path):
    trainer = trained(tmp_path)
    trainer.card_details.license = "dinov3-license"
    data = card_of(trainer).data
    assert (data.license, data.license_name) == ("other", "dinov3-license")


def test_a_regular_expression_does_not_break_the_table(tmp_path):
    text = card_of(trained(tmp_path, AMPConfig(perturb="fc1|fc2"))).text
    assert r"| `perturb` | `fc1\|fc2` |" in text


# Names, as whoever made a model or a data set may have chosen them.
HOSTILE = [
    "a\n# Another heading\n\n<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "javascript:alert(1)/x",
    '"><img src=x onerror=alert(1)>',
    "![a picture](https://example.org/x.png)",
    "a | b `c` \\| d \\",
    "``` and *emphasis* and _more_ of __it__ and ~~this~~",
    "&lt;script&gt; {{ 7 * 7 }} {% raw %}",
    "a\n---\nlicense: other\n---\n",
    "- a\n- b\r\n1. c\u2028d\x00e",
    "x: [1, 2]  # not YAML",
]


def rendered(text):
    markdown = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    markdown.validateLink = lambda url: True  # or it would leave out javascript:
    return markdown.parse(text)


def inline(tokens, kind):
    """The text of every heading, or table cell, as a reader sees it."""
    return [
        "".join(child.content for child in token.children if child.type != "html_inline")
        for before, token in itertools.pairwise(tokens)
        if before.type == kind
    ]


def plain(name):
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def as_code(name):
    return name if name.isprintable() else repr(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_name_says_the_card_keeps_its_shape(tmp_path, name):
    def metrics(prediction):
        return {name: 0.5, "said": name}

    trainer = trainer_for(
        make(MLP), tmp_path, data=digits()[:64], eval_strategy="steps", eval_steps=4,
        trainer={"compute_metrics": metrics, "eval_dataset": digits()[:8]},
    )  # fmt: skip
    trainer.train()
    trainer.evaluate(metric_key_prefix=name)
    trainer.card_details.dataset = trainer.card_details.base_model = name
    trainer.card_details.pictures = {name: name}
    trainer.card_details.license = name
    card = card_of(trainer, model_name=name)
    tokens = rendered(card.text)

    headings = [plain(name), "Results", "Training", "Cost", "Versions", "Citation"]
    assert inline(tokens, "heading_open") == headings
    children = [child for token in tokens for child in token.children or [token]]
    found = {child.content for child in children if child.type in ("html_inline", "html_block")}
    assert found <= {"<code>", "</code>"}
    assert [child for child in children if child.type == "link_open"] == []
    (picture,) = [child for child in children if child.type == "image"]
    assert unquote(picture.attrs["src"]) == unquote(quote(name))
    assert "".join(child.content for child in picture.children) == plain(name)

    cells = inline(tokens, "td_open")
    assert plain(f"{name}: {name}") in cells
    assert plain(name) in cells  # what `metrics` said in the course of the training
    (introduction,) = [token for token in tokens if token.content.startswith("This model")]
    seen = "".join(c.content for c in introduction.children if c.type != "html_inline")
    assert seen.count(as_code(name)) == 2

    assert card.data.model_name == name
    assert {result.dataset_name for result in card.data.eval_results} == {name}
    assert name in {result.metric_type for result in card.data.eval_results}
    assert card.data.license == "other"
    assert (card.data.base_model, card.data.datasets) == (None, None)  # the Hub would refuse them


@pytest.mark.parametrize(
    "perturb",
    ["(?x) fc1 | # the first\n  fc2", "fc1`|fc2", r"fc1\||fc2", "fc1|<b>[*]|_"],
)
def test_a_regular_expression_of_any_kind_is_one_cell_of_the_table(tmp_path, perturb):
    cells = inline(rendered(card_of(trained(tmp_path, AMPConfig(perturb=perturb))).text), "td_open")
    assert cells[cells.index("perturb") + 1] == as_code(perturb)
    assert cells[cells.index("norm_stats") + 1] == "clean"


@pytest.mark.parametrize(
    "name", ['a "b"', r"C:\new", "```", "a'b\n```\nc", "ä \U0001f600", *HOSTILE[:3]]
)
def test_the_snippets_load_from_a_folder_of_any_name(tmp_path, name):
    small = dict(vocab_size=17, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0))
    trainer = trainer_for(model, tmp_path / name, data=strokes(), trainer={"data_collator": padded})
    fences = [token for token in rendered(card_of(trainer).text) if token.type == "fence"]
    snippets = [token.content for token in fences if token.info == "python"]
    loads = [
        ast.literal_eval(node)
        for snippet in snippets
        for call in ast.walk(ast.parse(snippet))
        if isinstance(call, ast.Call)
        for node in [*call.args, *(keyword.value for keyword in call.keywords)]
    ]
    assert loads == ["text-generation", *[str(tmp_path / name)] * 3]


def test_a_language_models_card_has_snippets_that_run(tmp_path):
    small = dict(vocab_size=17, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0))
    trainer = trainer_for(model, tmp_path, data=strokes(), trainer={"data_collator": padded})
    card = card_of(trainer)
    assert card.data.pipeline_tag == "text-generation"
    snippets = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(snippets) == 2
    assert "AutoModelForCausalLM" in snippets[1] and "AutoTokenizer" in snippets[1]
    for snippet in snippets:
        compile(snippet, "card", "exec")


def test_an_adapters_card_stays_one_of_peft_and_names_its_base(tmp_path):
    small = dict(vocab_size=17, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0))
    model.config._name_or_path = "openai-community/gpt2"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"]))
    trainer = trainer_for(adapted, tmp_path, data=strokes(), trainer={"data_collator": padded})
    trainer.save_model()
    card = card_of(trainer)
    assert card.data.library_name == "peft"
    assert "## Cost" in card.text
    assert card.data.base_model == "openai-community/gpt2"
    assert "[openai-community/gpt2](https://huggingface.co/openai-community/gpt2)" in card.text

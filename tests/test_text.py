"""recipes/train_text.py on real texts, what Python says of its own functions, with a tiny BERT."""

import json
import math
import re
import shutil
import textwrap

import datasets
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from scripts import RECIPES, run_here
from support import differing
from texts import MODULES, csv_folder, save_encoder, texts
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    XLNetConfig,
    pipeline,
    set_seed,
)

from amp_hf import AMPConfig
from amp_hf.job.saved import origin_on_card
from amp_hf.text.arguments import parse
from amp_hf.text.classification import TextJob, main

QUICK = ["--num_train_epochs=2", "--use_cpu", "--report_to=none", "--learning_rate=1e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return csv_folder(tmp_path_factory.mktemp("functions"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def arguments(data, encoder, folder, *more):
    words = ["--model", encoder, "--dataset", data, "--output_dir", str(folder)]
    return [*QUICK, *words, "--label_column=module", *map(str, more)]


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def code_printed(capsys):
    """What the recipe has printed last on how to load the model."""
    printed = capsys.readouterr().out.rpartition("It loads without amp_hf:")[2]
    return textwrap.dedent(printed).strip()


def nll_by(classify, rows):
    losses = []
    for row, scores in zip(rows, classify(rows["what"][:], top_k=None)):
        (score,) = [each["score"] for each in scores if each["label"] == row["module"]]
        losses.append(-math.log(score))
    return sum(losses) / len(losses)


def nll(logits, label_names, rows):
    labels = torch.tensor([label_names.index(row["module"]) for row in rows])
    return torch.nn.functional.cross_entropy(logits, labels).item()


@pytest.mark.slow
def test_the_text_recipe_trains_tests_compares_and_says_how_to_load(
    tmp_path, data, encoder, monkeypatch, capsys
):
    argv = arguments(data, encoder, tmp_path / "out", "--epsilon=0.1", "--text_column=what")
    more = ["--compare_erm", "--flatness", "--max_train_samples=16"]
    run_here(RECIPES / "train_text.py", monkeypatch, *argv, *more)
    out = tmp_path / "out"
    assert f'pipeline("text-classification", model="{out}")' in capsys.readouterr().out
    rows = datasets.load_dataset(data)["test"]
    classify = pipeline("text-classification", model=str(out))
    assert nll_by(classify, rows) == pytest.approx(results(out)["test_nll"], abs=1e-4)
    assert AMPConfig.from_json_file(out / "amp_config.json").epsilon == 0.1

    card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.base_model is None and str(tmp_path) not in str(card.data.to_dict())
    (line,) = [line for line in card.text.splitlines() if line.startswith("| test: accuracy")]
    assert re.fullmatch(r"\| [^|]+ \| [\d.%]+ \| [\d.%]+ \|", line)
    assert "largest eigenvalue" in card.text and card.text.count(".png)") == 3
    # The baseline is what the stock Trainer trains from the same seed.
    stock = arguments(data, encoder, tmp_path / "stock", "--epsilon=0", "--max_train_samples=16")
    main(argv=stock)
    baseline, expected = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (out / "_erm", tmp_path / "stock")
    )
    assert differing(baseline, expected) == []


@pytest.mark.slow
def test_adapters_are_saved_and_the_code_printed_loads_them(tmp_path, data, encoder, capsys):
    argv = arguments(data, encoder, tmp_path, "--epsilon=0.1", "--lora=4", "--compare_erm")
    found = main(argv=argv)
    saved = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved
    card = (tmp_path / "README.md").read_text()
    code = code_printed(capsys)
    names = {}
    exec(code, names)
    shown = re.search(r"It loads without amp_hf:\n\n```python\n(.+?)\n```", card, re.DOTALL)
    assert shown[1] == code
    assert encoder not in card  # a path of this machine
    rows = datasets.load_dataset(data)["test"]
    with torch.no_grad():
        encoded = names["tokenizer"](rows["what"][:], padding=True, return_tensors="pt")
        logits = names["model"].eval()(**encoded).logits
    assert nll(logits, sorted(MODULES), rows) == pytest.approx(found["test_nll"], abs=1e-5)
    predicted = [sorted(MODULES)[i] for i in logits[:4].argmax(1)]
    assert [each["label"] for each in names["classify"](rows["what"][:4])] == predicted
    assert ModelCard(card).data.pipeline_tag == "text-classification"
    # What --flatness measures: the loss along the adapters and the head.
    job = TextJob(*parse(argv=argv))
    trained, loaded = (
        {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for model in (job.trainer.model, job.load(str(tmp_path)))
    )
    assert trained == loaded and any("lora_A" in name for name in trained)


@pytest.mark.slow
def test_adapters_on_a_model_with_a_head_for_other_classes_are_measured_and_load(
    tmp_path, data, encoder, capsys
):
    base = shutil.copytree(encoder, tmp_path / "base")
    of_others = dict(num_labels=5, problem_type="multi_label_classification")
    AutoModelForSequenceClassification.from_pretrained(base, **of_others).save_pretrained(base)
    argv = arguments(data, str(base), tmp_path / "out", "--lora=4", "--flatness")
    main(argv=[*argv, "--max_train_samples=16"])
    assert "trace of the Hessian" in (tmp_path / "out" / "README.md").read_text()
    names = {}
    exec(code_printed(capsys), names)
    scores = {each["label"]: each["score"] for each in names["classify"]("A text.", top_k=None)}
    assert {*scores} == {*MODULES} and sum(scores.values()) == pytest.approx(1)


@pytest.mark.slow
def test_adapters_of_an_earlier_run_are_not_loaded_on_top_of_a_whole_model(
    tmp_path, data, encoder, capsys
):
    main(argv=arguments(data, encoder, tmp_path, "--lora=4"))
    found = main(argv=arguments(data, encoder, tmp_path))
    names = {}
    exec(code_printed(capsys), names)
    rows = datasets.load_dataset(data)["test"]
    assert nll_by(names["classify"], rows) == pytest.approx(found["test_nll"], abs=1e-4)
    assert (tmp_path / "_earlier" / "adapter_model.safetensors").exists()
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "transformers"


def test_from_scratch_a_model_is_in_float32_whatever_its_config_says(tmp_path, data, encoder):
    half = shutil.copytree(encoder, tmp_path / "half")
    AutoConfig.from_pretrained(half, dtype="bfloat16").save_pretrained(half)
    assert "bfloat16" in (half / "config.json").read_text()
    job = TextJob(*parse(argv=arguments(data, str(half), tmp_path / "out", "--from_scratch")))
    assert {each.dtype for each in job.trainer.model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_model_that_returns_more_than_its_logits_is_measured_by_them(tmp_path, data, encoder):
    folder = shutil.copytree(encoder, tmp_path / "bart")
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2)
    tokens = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3)
    BartModel(BartConfig(vocab_size=500, d_model=32, **layers, **heads, **tokens)).save_pretrained(
        folder
    )
    found = main(argv=arguments(data, str(folder), tmp_path / "out", "--compare_erm"))
    assert 0 < found["test_nll"] < 2
    assert (tmp_path / "out" / "reliability.png").exists()


def test_with_adapters_every_new_module_is_trained_and_saved(tmp_path, data, encoder):
    """Not only the head: DistilBERT puts a new layer in front of it."""
    folder = shutil.copytree(encoder, tmp_path / "distilbert")
    sizes = dict(dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    DistilBertModel(DistilBertConfig(vocab_size=500, **sizes)).save_pretrained(folder)
    argv = arguments(data, str(folder), tmp_path / "out", "--lora=4")
    job = TextJob(*parse(argv=argv))
    trained = [name for name, each in job.trainer.model.named_parameters() if each.requires_grad]
    assert any("pre_classifier" in name for name in trained)
    job.trainer.save_model()
    set_seed(1)
    before, after = (
        {name: value for name, value in model.state_dict().items() if "original_module" not in name}
        for model in (job.trainer.model, job.load(str(tmp_path / "out")))
    )
    assert differing(before, after) == []


def test_a_text_is_cut_off_where_the_encoder_ends(tmp_path, data, encoder):
    folder = shutil.copytree(encoder, tmp_path / "short")
    AutoTokenizer.from_pretrained(folder, model_max_length=7).save_pretrained(folder)
    job = TextJob(*parse(argv=arguments(data, str(folder), tmp_path / "out")))
    assert max(map(len, job.trainer.train_dataset["input_ids"])) == 7


def test_a_text_is_cut_off_where_the_positions_end_if_the_tokenizer_does_not_say(tmp_path, encoder):
    rows = texts().select(range(8)).map(lambda row: {"what": f"{row['what']} " * 100})
    rows.to_json(tmp_path / "long.jsonl")
    argv = arguments(str(tmp_path / "long.jsonl"), encoder, tmp_path / "out", "--max_length=1000")
    job = TextJob(*parse(argv=argv))
    assert max(map(len, job.trainer.train_dataset["input_ids"])) == 512

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    roberta = RobertaConfig(vocab_size=500, max_position_embeddings=40, pad_token_id=0, **sizes)
    xlnet = XLNetConfig(vocab_size=500, d_model=32, n_layer=1, n_head=2, d_inner=64)
    for config, length in ((roberta, 39), (xlnet, 1000)):  # whose positions have no end
        folder = shutil.copytree(encoder, tmp_path / config.model_type)
        AutoModel.from_config(config).save_pretrained(folder)
        job = TextJob(*parse(argv=[*argv, f"--model={folder}"]))
        assert max(map(len, job.trainer.train_dataset["input_ids"])) == length
    job = TextJob(*parse(argv=[*argv, f"--model={tmp_path / 'roberta'}"]))
    assert math.isfinite(job.trainer.train().training_loss)


def test_an_encoder_that_was_trained_for_several_labels_a_text_learns_one(tmp_path, data, encoder):
    folder = shutil.copytree(encoder, tmp_path / "toxic")
    config = AutoConfig.from_pretrained(folder, problem_type="multi_label_classification")
    config.save_pretrained(folder)
    argv = arguments(data, str(folder), tmp_path / "out", "--max_train_samples=8")
    assert math.isfinite(main(argv=argv)["test_nll"])


@pytest.mark.parametrize("lora", [0, 4])
def test_accumulated_micro_batches_are_averaged(tmp_path, data, encoder, lora):
    losses = []
    for size, count in ((16, 1), (4, 4)):
        sizes = [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={count}"]
        sizes += ["--max_train_samples=16", "--learning_rate=1e-9"]
        argv = arguments(data, encoder, tmp_path, *sizes, f"--lora={lora}")
        losses.append(main(argv=argv)["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # dropout differs


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path, data, encoder, capsys):
    folder = shutil.copytree(encoder, tmp_path / "unpadded")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(SystemExit):
        main(argv=arguments(data, str(folder), tmp_path / "out"))
    assert "could not be loaded (its tokenizer has no padding token)" in capsys.readouterr().err


def test_adapters_resume_to_the_bit(tmp_path, data, encoder):
    def train(name, *more):
        folder = tmp_path / name
        more = ["--epsilon=0.1", "--lora=4", "--max_train_samples=32", "--seed=3", *more]
        main(argv=arguments(data, encoder, folder, *more))
        return (folder / "adapter_model.safetensors").read_bytes()

    whole = train("whole")
    assert (
        train("resumed", "--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-1") == whole
    )
    assert train("other", "--learning_rate=1e-4") != whole


@pytest.mark.slow
def test_a_model_whose_weights_have_older_names_resumes_and_is_measured(tmp_path, data, encoder):
    old = shutil.copytree(encoder, tmp_path / "old")
    weights = safetensors.torch.load_file(old / "model.safetensors")
    renamed = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in weights.items()
    }
    assert len(renamed.keys() - weights.keys()) == 10
    safetensors.torch.save_file(renamed, old / "model.safetensors", {"format": "pt"})

    def train(name, *more):
        folder = tmp_path / name
        argv = arguments(data, str(old), folder, "--max_train_samples=32", "--epsilon=0.1", *more)
        main(argv=[*argv, "--learning_rate=1e-2"])
        return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()

    whole = train("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    resumed = train("resumed", "--resume_from_checkpoint", checkpoint, "--flatness")
    assert differing(resumed, whole) == []
    assert (tmp_path / "resumed" / "flatness.json").exists()


def test_a_pair_of_columns_is_encoded_together_and_what_is_long_is_cut(tmp_path, encoder):
    pairs = texts().select(range(24)).map(lambda row: {"twice": f"{row['what']} " * 20})
    pairs.to_json(tmp_path / "pairs.jsonl")
    argv = arguments(str(tmp_path / "pairs.jsonl"), encoder, tmp_path / "out", "--max_length=40")
    argv += ["--text_column", "what", "twice", "--validation_fraction=0.25"]
    job = TextJob(*parse(argv=argv))
    batch = next(iter(job.trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] == 40
    assert ((batch["input_ids"] == 3).sum(1) == 2).all()  # two separators
    assert len(job.trainer.train_dataset) + len(job.trainer.eval_dataset) == 24
    assert not job.tests


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text_column=nope"], "has no text column 'nope'; it has what ("),
        (["--label_column=nope"], "has no label column 'nope'"),
        (["--model=no/such/encoder"], "--model 'no/such/encoder' could not be loaded"),
        (["--dataset=no/such/set"], "could not be loaded"),
        (["--lora=-1"], "--lora must be at least 0, got -1."),
        (["--lora=4", "--from_scratch"], "--lora adapts pretrained weights"),
        (["--max_length=0"], "--max_length must be at least 1, got 0."),
        (["--text_column", "what", "module", "what"], "takes one column or two that differ"),
        (["--text_column", "what", "what"], "takes one column or two that differ"),
        (["--text_column=module"], "module (ClassLabel): name one with --text_column."),
        (["--eval_splits=hard"], "has no split 'hard', only ['train', 'test']"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, data, encoder, capsys, words, said):
    with pytest.raises(SystemExit) as exit:
        main(argv=[*arguments(data, encoder, tmp_path), *words])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_label_of_strings_is_not_taken_for_the_text_and_other_columns_do_not_matter(
    tmp_path, encoder
):
    rows = [
        {"label": row["module"], "tags": ["a"], "from": {"page": 1}, "what": row["what"]}
        for row in texts().select(range(8))
    ]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    argv = ["--model", encoder, f"--dataset={tmp_path / 'rows.jsonl'}", f"--output_dir={tmp_path}"]
    job = TextJob(*parse(argv=argv))
    assert (job.text_columns, job.rows.label_column) == (["what"], "label")


def test_of_several_columns_of_strings_the_one_with_a_usual_name_is_taken_and_named(
    tmp_path, encoder, caplog
):
    rows = [{"id": f"row {i}", "sentence": "a text", "label": i % 2} for i in range(8)]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "ROWS.CSV")
    argv = ["--model", encoder, f"--dataset={tmp_path / 'ROWS.CSV'}", f"--output_dir={tmp_path}"]
    job = TextJob(*parse(argv=argv))
    assert job.text_columns == ["sentence"] and "The texts are column 'sentence'" in caplog.text
    assert "any of ['id']" in caplog.text
    caplog.clear()
    job = TextJob(*parse(argv=[*argv, "--text_column=id"]))
    assert job.text_columns == ["id"] and "The texts are" not in caplog.text


def test_of_several_columns_of_strings_without_a_usual_name_none_is_guessed(
    tmp_path, encoder, capsys
):
    rows = [{"id": f"row {i}", "what": "a text", "label": i % 2} for i in range(8)]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
    data = ["--dataset", str(tmp_path / "rows.csv")]
    with pytest.raises(SystemExit):
        main(argv=["--model", encoder, *data, f"--output_dir={tmp_path / 'out'}"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"has no text column; it has id \(.*\), what \(.*\), label .*: name one", line)


@pytest.mark.parametrize(
    ("head", "origin"),
    [
        ("license: MIT\nbase_model: a/b", ("a/b", "MIT")),
        ("license: other\nlicense_name: my-own", (None, "my-own")),
        ("license: [mit, apache-2.0]", (None, None)),
        ("license: 'mit", (None, None)),
        ("1: 2", (None, None)),
        ("base_model: [{a: b}]", (None, None)),
    ],
)
def test_a_base_models_card_of_any_kind_does_not_stop_the_training(tmp_path, head, origin):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert origin_on_card(str(tmp_path)) == origin


def test_a_class_that_is_called_minus_one_is_refused_with_a_remedy(tmp_path, encoder):
    rows = [row | {"label": (-1) ** i} for i, row in enumerate(texts())]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "train.csv")
    words = arguments(str(tmp_path / "train.csv"), encoder, tmp_path, "--text_column=what")
    argv = [word for word in words if "label_column" not in word]
    with pytest.raises(ValueError, match=r"-1 stands for unlabeled: .* call that class something"):
        TextJob(*parse(argv=argv))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "No columns to parse from file"),
        ("what,module\na,b\nc,d,e,f\n", "Expected 2 fields in line 3, saw 4"),
        (
            "what,module\n1,b\n",
            "it has what (int64), module (ClassLabel): none of these types will do.",
        ),
    ],
)
def test_a_broken_file_ends_with_what_is_wrong_with_it(tmp_path, encoder, capsys, lines, said):
    file = tmp_path / "rows.csv"
    file.write_text(lines)
    with pytest.raises(SystemExit) as exit:
        main(argv=arguments(str(file), encoder, tmp_path / "out"))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and said in line and "train_digits" not in line


def test_one_of_several_configurations_is_chosen_by_name(tmp_path, encoder, capsys):
    head = ["---", "configs:"]
    for i, name in enumerate(["first", "second"], start=1):
        texts().select(range(8 * i)).to_csv(tmp_path / f"{name}.csv")
        head += [f"- config_name: {name}", f"  data_files: {name}.csv"]
    (tmp_path / "README.md").write_text("\n".join([*head, "---", ""]))
    argv = arguments(str(tmp_path), encoder, tmp_path / "out")
    job = TextJob(*parse(argv=[*argv, "--dataset_config=second"]))
    assert len(job.trainer.train_dataset) == 16
    with pytest.raises(SystemExit):
        main(argv=argv)
    assert "['first', 'second'], with --dataset_config" in capsys.readouterr().err


def test_a_row_without_a_class_among_numbers_is_called_that(tmp_path, encoder, capsys):
    lines = ["what,module", *(f"text {i},{'' if i == 3 else i % 2}" for i in range(8))]
    (tmp_path / "some.csv").write_text("\n".join(lines))
    with pytest.raises(SystemExit):
        main(argv=arguments(str(tmp_path / "some.csv"), encoder, tmp_path / "out"))
    assert "'module' has rows without a label: leave them out." in capsys.readouterr().err


def test_numbers_with_fractions_are_no_classes(tmp_path, encoder, capsys):
    rows = texts().select(range(8)).map(lambda row: {"score": len(row["what"]) / 7})
    rows.to_parquet(tmp_path / "scored.parquet")
    argv = arguments(str(tmp_path / "scored.parquet"), encoder, tmp_path / "out")
    with pytest.raises(SystemExit):
        main(argv=[*argv, "--label_column=score"])
    assert "'score' holds numbers of type float64, which are not classes" in capsys.readouterr().err

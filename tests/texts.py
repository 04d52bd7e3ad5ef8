"""Real texts, what Python says of its own functions, and a tiny BERT that knows their words."""

import builtins
import inspect
import math
import os

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

MODULES = {"builtins": builtins, "math": math, "os": os}


def texts():
    """The first line of each function's description, and the module that it is of."""
    rows = []
    for name, module in MODULES.items():
        for function in vars(module).values():
            lines = (inspect.getdoc(function) or "").splitlines() if callable(function) else []
            rows += [{"what": line, "module": name} for line in lines[:1] if line]
    return datasets.Dataset.from_list(rows).shuffle(seed=0)


def csv_folder(folder):
    """160 texts, a quarter of them to test on, as people have them."""
    folder.mkdir(exist_ok=True)
    rows = texts()
    rows.select(range(120)).to_csv(folder / "train.csv")
    rows.select(range(120, 160)).to_csv(folder / "test.csv")
    datasets.load_dataset(str(folder))  # shows progress the first time
    return str(folder)


def save_encoder(folder):
    """With random weights, and a tokenizer that knows these words."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(
        texts()["what"][:], trainers.WordLevelTrainer(vocab_size=500, special_tokens=special)
    )
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    set_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=500, **sizes)).save_pretrained(folder)
    return str(folder)

"""Tiny streams: their rows and settings, and what a run of them leaves on disk."""

import csv
import json
import random
from pathlib import Path

import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file

import pm_hf.runs.learner
from helpers import with_changes
from helpers.adapter_folders import peft_quiet
from helpers.models import KINDS, TARGETS, tiny_folder
from pm_hf.adapters.folder import open_adapter
from pm_hf.adapters.layout import ADAPTER_WEIGHTS, PEFT_PREFIX
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.data.encoders import TextEncoder
from pm_hf.data.stream import batches
from pm_hf.models.loading import load_merged, load_tokenizer
from pm_hf.models.lora import adapted_layers, layer_product
from pm_hf.models.task_model import TASK_ADAPTER, build_task_model

WORDS = [f"{kind}{i}" for kind in ("apple", "bird", "car", "dog", "egg", "fog", "the", "of") for i in range(6)]
CLASSES = ("apple", "bird", "car", "dog", "egg", "fog")  # a text's class is the kind of word it has most of


def write_base(folder: Path) -> Path:
    """A BERT encoder with 2 layers of width 32, without a head, and its word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.1,  # wide enough for a random encoder to carry the words to the pooled position
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_rows(path: Path, classes, per_class: int, seed: int, **columns) -> Path:
    """CSV of texts with `per_class` rows of each class; further columns hold a constant, or one value a row."""
    rng = random.Random(seed)
    rows = []
    for label in classes:
        for _ in range(per_class):
            kinds = [label] * 3 + rng.choices(["the", "of"], k=rng.randint(1, 4))
            rng.shuffle(kinds)
            rows.append({"text": " ".join(f"{kind}{rng.randrange(6)}" for kind in kinds), "label": label, **columns})
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


GROUPS = {"first": ["apple", "bird"], "second": ["car", "dog"], "third": ["egg", "fog"]}
TRAINING = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 2e-2,
    "head_learning_rate": 2e-2,
}
FEW = {"training__num_train_epochs": 2, "curvature__samples": 8, "training__save_strategy": "no"}
HEAD = "classifier"
LANGUAGE_TASKS = {"first": ("red", "blue"), "second": ("green", "gold")}
THIRD = {"third": ("dark", "pale")}


def first(count):
    """The first groups of classes."""
    return dict(list(GROUPS.items())[:count])


def write_data(folder, per_class=24):
    """train.csv and test.csv of all classes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.csv", CLASSES, per_class, seed=1)
    write_rows(folder / "test.csv", CLASSES, 8, seed=2)
    return folder


def settings(base, data, output, method="pm", groups=3, **changes):
    """Settings of a stream; `changes` are dotted keys with __ for the dot."""
    config = {
        "output_dir": str(output),
        "data_dir": str(data),
        "method": method,
        "model": {"base": str(base)},
        "stream": {"train": "train.csv", "test": "test.csv", "class_groups": first(groups), "max_length": 16},
        "lora": {"r": 2, "alpha": 4, "target_modules": ["key", "value"]},
        "curvature": {"samples": 32},
        "training": TRAINING,
    }
    return with_changes(config, changes)


def domains(base, data, output, method="pm", **changes):
    """Settings of a domain-incremental stream of two domains: the second one calls the classes by other words."""
    data.mkdir(parents=True, exist_ok=True)
    swapped = {"apple": "dog", "bird": "egg", "car": "fog"}
    for name, seed in (("train", 1), ("test", 2)):
        write_rows(data / f"plain-{name}.csv", swapped, 24 if name == "train" else 8, seed)
        text = write_rows(data / "words.csv", swapped.values(), 24 if name == "train" else 8, seed + 2).read_text()
        lines = [line.rsplit(",", 1) for line in text.splitlines()]
        back = {word: label for label, word in swapped.items()}
        (data / f"odd-{name}.csv").write_text("\n".join(f"{t},{back.get(y, y)}" for t, y in lines) + "\n")
    tasks = [{"name": n, "train": f"{n}-train.csv", "test": f"{n}-test.csv"} for n in ("plain", "odd")]
    config = settings(base, data, output, method, **changes)
    config["stream"] = {"scenario": "domain_incremental", "tasks": tasks, "max_length": 16}
    return config


def write_yaml(path, config):
    """The settings as a YAML file, in their own order."""
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def contents(folder):
    """{relative path: bytes} of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def steps(folder):
    """step.json of every finished task, in order."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("task-*/step.json"))]


def at(line, alpha):
    """The point of a merge line at a coefficient."""
    (point,) = [point for point in line["points"] if point["coefficient"] == alpha]
    return point


def tensors(adapter):
    """{name without PEFT's prefix: tensor} of an adapter folder."""
    return {name.removeprefix(PEFT_PREFIX): value for name, value in load_file(Path(adapter) / ADAPTER_WEIGHTS).items()}


def same_tensors(left, right):
    """Whether two adapter folders hold bit-identical tensors."""
    one, two = tensors(left), tensors(right)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def dense(adapter):
    """{module: the weight update as (out, in) in float64}, straight from the file."""
    opened, values = open_adapter(adapter), tensors(adapter)
    return {
        module: scale * values[f"{module}.lora_B.weight"].double() @ values[f"{module}.lora_A.weight"].double()
        for module, scale in opened.scaling.items()
    }


# ---- what training was called with


def tasks(folder):
    """Folders of the finished tasks, in order."""
    return [path.parent for path in sorted(folder.glob("task-*/step.json"))]


class Seen:
    """What `train` was called with: models, their products before and after by task, the last inputs."""

    def __init__(self, monkeypatch):
        self.before, self.after, self.models = [], [], []
        train = pm_hf.runs.learner.train

        def watched(built, examples, collate, *args, **kwargs):
            self.inputs = collate(examples[:16])
            self.models.append(built.model)
            self.before.append(self._products(built.model))
            found = train(built, examples, collate, *args, **kwargs)
            self.after.append(self._products(built.model))
            return found

        monkeypatch.setattr(pm_hf.runs.learner, "train", watched)

    def _products(self, model):
        layers = adapted_layers(model, TASK_ADAPTER)
        return {n: layer_product(layer, layer.active_adapters).to(torch.float64).dense() for n, layer in layers.items()}


def assert_near(left, right, tolerance=1e-5):
    """Same names, values equal up to `tolerance`."""
    assert left.keys() == right.keys()
    assert left
    for name, value in left.items():
        assert torch.allclose(value, right[name], atol=tolerance), name


# ---- streams of a language model


def words(kind, rng):
    """A text of three words of a kind, and of none or one of any."""
    found = [f"{kind}{rng.randrange(5)}" for _ in range(3)]
    found += [f"{rng.choice(KINDS)}{rng.randrange(5)}" for _ in range(rng.randrange(2))]
    rng.shuffle(found)
    return " ".join(found)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def talk(kind, rng):
    """A conversation of two turns."""
    turns = [{"role": "user", "content": words(kind, rng)}, {"role": "assistant", "content": kind}]
    return {"messages": [*turns, {"role": "user", "content": words(kind, rng)}, turns[1]]}


def write_language_data(folder):
    """Texts with their kind, plain texts by domain, a held-out text, conversations."""
    rng = random.Random(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, kinds in LANGUAGE_TASKS.items():
            pairs = [(words(kind, rng), kind) for _ in range(count) for kind in kinds]
            write_lines(folder / f"{name}-{split}.jsonl", [{"text": t, "label": k} for t, k in pairs])
            write_lines(folder / f"{name}-chat-{split}.jsonl", [talk(k, rng) for k in kinds for _ in range(count // 2)])
        rows = [{"text": words(kind, rng), "source": kind} for kind in ("red", "gold") for _ in range(count)]
        write_lines(folder / f"domains-{split}.jsonl", rows)
    write_lines(folder / "held.jsonl", [{"text": words("dark", rng)} for _ in range(4)])
    for split, count in (("train", 12), ("test", 4)):
        rows = [{"text": words(kind, rng), "label": kind} for _ in range(count) for kind in THIRD["third"]]
        write_lines(folder / f"third-{split}.jsonl", rows)
    for kind in TARGETS:
        tiny_folder(kind, folder / kind)
    return folder


def language_settings(data, output, model="llama", method="pm", **changes):
    """A stream of two tasks of prompts; `changes` are dotted keys with __ for the dot."""
    config = {
        "output_dir": str(output),
        "data_dir": str(data),
        "method": method,
        "model__base": str(data / model),
        "stream__kind": "seq2seq-lm" if model == "t5" else "causal-lm",
        "stream__prompt_template": "Text: {text}\nAnswer:",
        "stream__max_length": 24,
        "stream__tasks": [{"name": n, "train": f"{n}-train.jsonl", "test": f"{n}-test.jsonl"} for n in LANGUAGE_TASKS],
        "lora": {"r": 4, "alpha": 8, "target_modules": TARGETS[model]},
        "curvature__samples": 12,
        "training": {"num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-2},
    }
    return with_changes({}, config | changes)


def loaded(config, adapter):
    """The adapter of a stream of prompts on its base, with transformers and peft alone."""
    kind = "Seq2SeqLM" if config["stream"]["kind"] == "seq2seq-lm" else "CausalLM"
    base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(config["model"]["base"])
    return PeftModel.from_pretrained(base, str(adapter)).eval()


# ---- adapters trained without the learner


def trained_adapter(task, number, base, folder):
    """An adapter trained from the base on one task, and its training inputs."""
    model_settings = ModelSettings(base=str(base))
    encoder = TextEncoder(load_tokenizer(model_settings), 16)
    lora = LoraSettings(r=2, alpha=4, target_modules=["key", "value"])
    model = build_task_model(model_settings, lora, task.labels, None, 0, number).model
    data = list(batches(encoder, encoder.examples(task.train, task.labels), 16))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for inputs in data * 8:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
    with peft_quiet():
        model.save_pretrained(folder)
    (folder / TASK_ADAPTER / "labels.json").write_text(json.dumps({"classifier": task.labels}))
    return folder / TASK_ADAPTER, data


def merged_accuracy(tasks, base, folder):
    """Share of all test rows whose class is found among all classes."""
    labels, model_settings = [label for task in tasks for label in task.labels], ModelSettings(base=str(base))
    model, encoder, right = (
        load_merged(model_settings, folder, labels),
        TextEncoder(load_tokenizer(model_settings), 16),
        [],
    )
    for task in tasks:
        for inputs in batches(encoder, encoder.examples(task.test, labels), 16):
            with torch.no_grad():
                right += (model(**inputs).logits.argmax(-1) == inputs["labels"]).tolist()
    return sum(right) / len(right)

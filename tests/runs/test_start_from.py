"""A run that starts from an adapter trains the model that was released, whatever the adapter's folder holds.

With learning rate 0 nothing moves, so the loss that training reports is the loss of the folder as PEFT alone loads it,
and so is that of the merge that is published.
"""

import json
import random

import pytest
import torch
from helpers.models import OLD_NAME, SIZE, tiny_model, word_tokenizer
from helpers.started import BASES, COPIED, KINDS, PEFT_WARNINGS, Kind, attention, load_alone, save_base, save_start
from helpers.streams import domains, settings, steps, tensors, write_lines
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pm_hf.runs.learner
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.errors import InputError
from pm_hf.runs.learner import evaluate, learn

pytestmark = [pytest.mark.filterwarnings(OLD_NAME), *map(pytest.mark.filterwarnings, PEFT_WARNINGS)]
EXACT = {"rel": 1e-5}
DEFAULT = ("saved embeddings", "bias", "LoRA on the embeddings", "resized and copied")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bases with their tokenizers, rows of one answer each."""
    folder = tmp_path_factory.mktemp("start")
    for name in BASES:
        save_base(name, folder / name)
    texts = [{"text": f"red{i % 5} gold{(i + 1) % 5}", "label": ("red", "blue")[i % 2]} for i in range(8)]
    write_lines(folder / "rows.jsonl", texts)
    return folder


def language(data, kind, output, start, method="average", **changes):
    return {
        "output_dir": str(output),
        "data_dir": str(data),
        "method": method,
        "model": {"base": str(data / kind.base)},
        "stream": {
            "kind": kind.stream,
            "prompt_template": "Text: {text} Answer:",
            "max_length": 24,
            "tasks": [{"name": "one", "train": "rows.jsonl", "test": "rows.jsonl"}],
        },
        "lora": {"r": 2} | attention(kind.base),
        "curvature": {"samples": 4},
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.0,
            "save_strategy": "no",
        },
        "start_from": str(start),
    } | changes


def loss_alone(kind, data, folder, config):
    """Mean loss of the rows under a folder, as PEFT alone loads it."""
    read = load_config(config)
    encoder, task = make_encoder(read), load_stream(read).tasks[0]
    with torch.no_grad():
        model = load_alone(kind, data / kind.base, folder)
        return float(model(**encoder.collate(encoder.examples(task.train, task.labels))).loss)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DEFAULT else [pytest.mark.slow]) for n in KINDS if n != "experts"]
)
def test_what_is_trained_is_what_was_released(data, tmp_path, name):
    kind = KINDS[name]
    start = save_start(kind, data / kind.base, tmp_path / "start")
    config = language(data, kind, tmp_path / "run", start)
    learn(config)
    expected = loss_alone(kind, data, start, config)
    (step,) = steps(tmp_path / "run")
    assert step["training_loss"] == pytest.approx(expected, **EXACT)
    assert step["scores"]["loss"][0] == pytest.approx(expected, **EXACT)
    assert loss_alone(kind, data, tmp_path / "run" / "merged", config) == pytest.approx(expected, **EXACT)
    again = evaluate(load_config(config), tmp_path / "run" / "merged")
    assert again["one"]["loss"] == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize(("name", "method"), [("saved embeddings", "merge_only"), ("an expression", "average")])
def test_with_a_curvature_and_from_the_last_optimum_too(data, tmp_path, name, method):
    kind = KINDS[name]
    start = save_start(kind, data / kind.base, tmp_path / "start")
    config = language(data, kind, tmp_path / "run", start, method, merge={"train_from": "last", "coefficient": 0.5})
    learn(config)
    expected = loss_alone(kind, data, start, config)
    (step,) = steps(tmp_path / "run")
    assert step["training_loss"] == pytest.approx(expected, **EXACT)
    assert step["scores"]["loss"][0] == pytest.approx(expected, **EXACT)


CURVED = "use a method without curvature"
REFUSED = [
    ("experts", "average", "adapters with different target_parameters cannot be merged"),
    ("bias", "pm", f"has a LoRA bias or several matrices, of which no curvature is measured; {CURVED}"),
    ("experts", "pm", f"has a LoRA bias or several matrices, of which no curvature is measured; {CURVED}"),
    ("LoRA on the embeddings", "pm", rf"differ from the running merge's in \['model.embed_tokens'\].*{CURVED}"),
    ("plain", "cofima", "merge.method cofima needs curvature.safetensors beside it"),
    ("LoRA on the embeddings", "slao", "factors of model.embed_tokens that the new task cannot start with"),
    ("bias", "slao", "that the new task cannot start with"),
]


@pytest.mark.parametrize(("name", "method", "message"), REFUSED)
def test_what_cannot_be_carried_on_is_refused_before_any_folder_is_made(data, tmp_path, name, method, message):
    kind = KINDS[name]
    start = save_start(kind, data / kind.base, tmp_path / "start")
    with pytest.raises(InputError, match=message):
        learn(language(data, kind, tmp_path / "run", start, method))
    assert not (tmp_path / "run").exists()


def test_a_module_that_the_start_holds_whole_is_no_target(data, tmp_path):
    kind = KINDS["saved output embeddings"]
    start = save_start(kind, data / kind.base, tmp_path / "start")
    with pytest.raises(InputError, match="holds lm_head whole, which cannot be adapted besides"):
        learn(language(data, kind, tmp_path / "run", start, lora={"r": 2, "target_modules": ["q_proj", "lm_head"]}))
    assert not (tmp_path / "run").exists()


# ---- tokenizers


def larger_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>", "<other>"])
    return tokenizer


def test_the_tokenizer_beside_the_start_is_the_one_that_is_used(data, tmp_path):
    kind = Kind("llama", rows=SIZE + 2, saves=COPIED)
    start, tokenizer = save_start(kind, data / "llama", tmp_path / "start"), larger_tokenizer(data / "llama")
    tokenizer.save_pretrained(start)
    write_lines(data / "new.jsonl", [{"text": f"<new> red{i % 5} <other>", "label": "red"} for i in range(4)])
    config = language(data, kind, tmp_path / "run", start)
    config["stream"]["tasks"] = [{"name": "one", "train": "new.jsonl", "test": "new.jsonl"}]
    learn(config)
    encoder = make_encoder(load_config(config))
    assert SIZE in encoder.examples(load_stream(load_config(config)).tasks[0].train)[0]["input_ids"]
    expected = loss_alone(kind, data, start, config)
    (step,) = steps(tmp_path / "run")
    assert step["training_loss"] == pytest.approx(expected, **EXACT)
    merged, plain = tmp_path / "run" / "merged", {k: v for k, v in config.items() if k != "start_from"}
    tokenizer.save_pretrained(merged)
    assert evaluate(load_config(plain), merged)["one"]["loss"] == pytest.approx(expected, **EXACT)


def test_a_tokenizer_with_more_tokens_than_the_embeddings_have_rows_is_refused(data, tmp_path):
    kind = KINDS["plain"]
    start = save_start(kind, data / "llama", tmp_path / "start")
    larger_tokenizer(data / "llama").save_pretrained(start)
    with pytest.raises(InputError, match=f"has {SIZE + 2} tokens, the embeddings have {SIZE} rows"):
        learn(language(data, kind, tmp_path / "run", start))
    assert not (tmp_path / "run").exists()


# ---- classifiers


def predicted(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


SAVED = {
    "embeddings": ["word_embeddings"],
    "norms": ["LayerNorm"],
    "pooler": ["pooler"],
}


@pytest.mark.parametrize("name", SAVED)
def test_a_classifier_that_is_trained_is_the_one_that_was_released(tiny_base, tmp_path, monkeypatch, name):
    """All tasks share the labels, so the head of the adapter goes on too. Without dropout, which the base has."""
    logits, train = [], pm_hf.runs.learner.train

    def watched(built, examples, collate, *args, **kwargs):
        logits.append(predicted(built.model.eval(), collate(examples)))
        return train(built, examples, collate, *args, **kwargs)

    monkeypatch.setattr(pm_hf.runs.learner, "train", watched)
    labels = ["apple", "bird", "car"]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3, ignore_mismatched_sizes=True)
    saved = {"modules_to_save": ["classifier", *SAVED[name]], "target_modules": ["key", "value"]}
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **saved))
    torch.manual_seed(1)
    for key, value in model.named_parameters():
        if "lora_B" in key or "modules_to_save" in key:
            value.data += 0.2 * torch.randn_like(value)
    model.save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "labels.json").write_text(json.dumps({"classifier": labels}))
    still = {"training__learning_rate": 0.0, "training__head_learning_rate": 0.0, "training__num_train_epochs": 1}
    config = domains(tiny_base, tmp_path / "data", tmp_path / "run", "average", **still)
    config |= {"start_from": str(tmp_path / "start")}
    config["stream"]["tasks"] = config["stream"]["tasks"][:1]
    learn(config)
    read = load_config(config)
    encoder, (task,) = make_encoder(read), load_stream(read).tasks
    assert list(task.labels) == labels
    for folder in (tmp_path / "start", tmp_path / "run" / "merged"):
        fresh = AutoModelForSequenceClassification.from_pretrained(
            tiny_base, num_labels=3, ignore_mismatched_sizes=True
        )
        loaded = PeftModel.from_pretrained(fresh, str(folder)).eval()
        expected = predicted(loaded, encoder.collate(encoder.examples(task.train, labels)))
        assert torch.allclose(logits[0], expected, atol=1e-5)
    kept = {key for key in tensors(tmp_path / "start") if "lora_" not in key}
    assert kept <= set(tensors(tmp_path / "run" / "merged"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_without_a_pad_token_learns_and_tells_what_was_cut(data, tmp_path, name):
    """Scored in batches as row by row."""
    base, rng = tmp_path / "base", random.Random(0)
    tiny_model(name).save_pretrained(base)
    tokenizer = word_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    tokenizer.save_pretrained(base)
    rows = [{"text": " ".join([f"{kind}0"] * rng.randint(1, 9)), "label": kind} for kind in ("red", "blue") * 8]
    long = sum(len(row["text"].split()) > 6 for row in rows)
    write_lines(tmp_path / "rows.jsonl", rows)
    config = language(data, Kind(name), tmp_path / "run", "")
    del config["start_from"]
    config |= {"model": {"base": str(base)}, "data_dir": str(tmp_path)}
    tasks = [{"name": "one", "train": "rows.jsonl", "test": "rows.jsonl"}]
    config["stream"] = {"kind": "text-classification", "max_length": 6, "tasks": tasks}
    config["training"] |= {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_eval_batch_size": 8}
    learn(config)
    (step,) = steps(tmp_path / "run")
    cut = "are longer than stream.max_length and were cut"
    told = [f"{long} of 16 training rows {cut}", f"{long} of 16 test rows of one {cut}"]
    assert [note for note in step["notes"] if cut in note] == told
    for size in (1, 3):
        config["training"]["per_device_eval_batch_size"] = size
        again = evaluate(load_config(config), tmp_path / "run" / "merged")
        assert again["one"]["class_incremental"] == step["scores"]["class_incremental"][0]
        assert again.notes == [f"{long} of 16 test rows of one {cut}"]


def test_a_head_of_another_form_is_refused_before_any_folder_is_made(tiny_base, stream_data, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2, ignore_mismatched_sizes=True)
    config = LoraConfig(r=2, target_modules=["key", "value"], modules_to_save=["classifier"])
    get_peft_model(base, config).save_pretrained(tmp_path / "start")
    (tmp_path / "start" / "labels.json").write_text(json.dumps({"score": ["x", "y"]}))
    changes = {"start_from": str(tmp_path / "start")}
    with pytest.raises(InputError, match="labels.json"):
        learn(settings(tiny_base, stream_data(4), tmp_path / "run", "average", **changes))
    assert not (tmp_path / "run").exists()

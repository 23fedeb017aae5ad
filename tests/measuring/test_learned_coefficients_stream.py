"""Coefficients learned on the inputs of our own task stream, the merge loaded as every user loads it."""

import json

import torch
from helpers.adapter_folders import peft_quiet

from pm_hf import learn_coefficients, merge_adapters
from pm_hf.config.loading import load_config
from pm_hf.config.schema import LoraSettings, ModelSettings
from pm_hf.data.encoders import TextEncoder
from pm_hf.data.stream import batches, load_stream
from pm_hf.models.loading import load_base, load_merged, load_tokenizer
from pm_hf.models.task_model import TASK_ADAPTER, build_task_model


def trained(task, number, base, folder):
    """An adapter trained from the base on one task, and its training inputs."""
    settings = ModelSettings(base=str(base))
    encoder = TextEncoder(load_tokenizer(settings), 16)
    lora = LoraSettings(r=2, alpha=4, target_modules=["key", "value"])
    model = build_task_model(settings, lora, task.labels, None, 0, number).model
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


def accuracy(tasks, base, folder):
    """Share of all test rows whose class is found among all classes."""
    labels, settings = [label for task in tasks for label in task.labels], ModelSettings(base=str(base))
    model, encoder, right = load_merged(settings, folder, labels), TextEncoder(load_tokenizer(settings), 16), []
    for task in tasks:
        for inputs in batches(encoder, encoder.examples(task.test, labels), 16):
            with torch.no_grad():
                right += (model(**inputs).logits.argmax(-1) == inputs["labels"]).tolist()
    return sum(right) / len(right)


def test_learned_coefficients_beat_the_mean_on_three_tasks(stream_config, tiny_base, tmp_path):
    tasks = load_stream(load_config(stream_config)).tasks
    adapters, data = zip(*(trained(t, i, tiny_base, tmp_path / t.name) for i, t in enumerate(tasks)), strict=True)
    base, _ = load_base(ModelSettings(base=str(tiny_base)), [label for task in tasks for label in task.labels], 0)
    learned = learn_coefficients(base, list(data), adapters, per="task", steps=60, learning_rate=0.01)
    assert learned.history[-1] < 0.9 * learned.history[0]
    merge_adapters(adapters, tmp_path / "mean", method="average")
    merge_adapters(adapters, tmp_path / "learned", method="adamerging", learned=learned)
    mean, found = (accuracy(tasks, tiny_base, tmp_path / name) for name in ("mean", "learned"))
    assert found > mean + 0.1

"""The control `classifier` of a stream of prompts: the same rows as classes, by AutoModelForSequenceClassification."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from pm_hf.config.kinds import STREAM_KINDS
from pm_hf.config.schema import RunConfig
from pm_hf.data.encoders import make_encoder
from pm_hf.data.language import CausalEncoder
from pm_hf.data.rows import Rows
from pm_hf.data.stream import load_stream

CLASSES = "text-classification"


class PooledLlama(LlamaForSequenceClassification):
    """A Llama that classifies by its last token as transformers' does, with what `best` needs and that one lacks: a
    bias, and a head that sees the pooled state only."""

    accepts_loss_kwargs = False

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(  # noqa: D102
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutputWithPast:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.sum(1) - 1  # rows are padded on the right
        logits = self.score(states[torch.arange(len(last), device=last.device), last])
        loss = None if labels is None else cross_entropy(logits.float(), labels)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits)


def register() -> None:
    """From now on this process loads Llamas that classify as `PooledLlama`."""
    AutoModelForSequenceClassification.register(LlamaConfig, PooledLlama, exist_ok=True)


def as_classes(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Settings of a stream of prompts as one of classes, trained with `best` in the same steps; its rows are written to
    `folder`.

    A row's text is what the language model is shown before the answer, cut where it is cut there; the answers are the
    classes, and the same word is the same class in every task, as it is the same answer.
    """
    encoder, settings, tasks = make_encoder(config), config.to_dict(), []
    assert isinstance(encoder, CausalEncoder)
    folder.mkdir(parents=True, exist_ok=True)
    for task in load_stream(config).tasks:
        files = {split: f"{task.name}-{split}.jsonl" for split in ("train", "test")}
        for file, rows in zip(files.values(), (task.train, task.test), strict=True):
            _write(folder / file, encoder, rows)
        tasks.append({"name": task.name, **files})
    kept = ("output_dir", "seed", "model", "lora")
    head = {"head_learning_rate": STREAM_KINDS[CLASSES].training["head_learning_rate"]}
    return {key: settings[key] for key in kept} | {
        "method": "best",
        "data_dir": str(folder),
        "curvature": {"samples": config.curvature.samples},
        "training": config.training | head,
        "stream": {
            "kind": CLASSES,
            "max_length": config.stream.max_length,
            "shared_labels": True,
            "tasks": tasks,
        },
    }


def _write(path: Path, encoder: CausalEncoder, rows: Rows) -> None:
    """{"text", "label"} a line."""
    lines = []
    for prompt, kept, answer in zip(rows.inputs, encoder.prompts(rows), rows.labels, strict=True):
        whole = encoder.texts(prompt, answer)[0]
        inner = kept[1:] if kept[:1] == [encoder.tokenizer.bos_token_id] else kept  # which the classifier adds again
        text = whole if len(encoder.prompt(prompt)) == len(kept) else encoder.tokenizer.decode(inner)
        lines.append(json.dumps({"text": text, "label": answer.strip()}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")

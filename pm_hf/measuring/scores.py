"""Scores of a merged adapter on the tasks of a stream: of classifiers, and of language models."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from pm_hf.adapters.folder import open_adapter
from pm_hf.config.schema import RunConfig
from pm_hf.data.encoders import TextEncoder
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder, pad_rows
from pm_hf.data.rows import Encoder, Examples, Rows
from pm_hf.data.stream import Task, batches
from pm_hf.measuring.analytic_head import class_logits
from pm_hf.models.contexts import logits_only_at
from pm_hf.models.language_model import IGNORED, target_logits
from pm_hf.models.loading import load_merged
from pm_hf.models.lora import find_head
from pm_hf.models.sharded import transformer_of

ACCURACY_DESCRIPTION = "Accuracy of argmax over all classes seen, and of argmax inside the task's own classes."


class IncrementalAccuracy(evaluate.Metric):
    """Class-incremental and task-incremental accuracy of one task's test rows.

    compute(predictions=(n, C) logits over all classes seen, references=(n,) row indices, own=row indices of the
    task's classes) returns {"class_incremental": …, "task_incremental": …}, both shares in [0, 1].
    Works offline, unlike `evaluate.load("accuracy")`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=ACCURACY_DESCRIPTION, citation="", inputs_description="", features=datasets.Features(features)
        )

    def _compute(self, predictions: list, references: list, own: list[int]) -> dict[str, float]:
        logits, truth, rows = np.asarray(predictions), np.asarray(references), np.asarray(own)
        inside = rows[logits[:, rows].argmax(1)]
        return {
            "class_incremental": float((logits.argmax(1) == truth).mean()),
            "task_incremental": float((inside == truth).mean()),
        }


@dataclass(frozen=True)
class Scorer:
    """Runs merged adapters, loaded as every user loads them."""

    config: RunConfig
    encoder: Encoder
    batch_size: int
    autocast: torch.dtype | None
    device: torch.device = torch.device("cpu")
    cut: dict[str, int] = field(default_factory=dict)  # test rows of a language task that were longer than max_length

    def load(self, merged: Path, head: str | None) -> torch.nn.Module:
        """The merged adapter on its base, as every user loads it."""
        labels = () if head is None else open_adapter(merged).labels[head]
        return load_merged(self.config.model, merged, labels, self.config.stream.kind).to(self.device)

    def features(self, merged: Path, rows: Rows, labels: Sequence[str], head: str) -> torch.Tensor:
        """Input of the head's Linear under a merged adapter, (n, d)."""
        return self.features_of(self.load(merged, head), rows, labels, head)

    def features_of(self, model: torch.nn.Module, rows: Rows, labels: Sequence[str], head: str) -> torch.Tensor:
        """Input of the model's head, (n, d), in eval mode."""
        return self._forward(model, self.encoder.examples(rows, labels), head)[0]

    def logits(
        self, model: torch.nn.Module, task: Task, labels: Sequence[str], head: str
    ) -> tuple[torch.Tensor, list[int]]:
        """Logits of a task's test rows, (n, C), and the index of each one's label, both over the distinct `labels`.

        labels: of the head's rows; of several rows of one label the largest logit is taken.
        """
        rows = self._forward(model, self.encoder.examples(task.test, list(dict.fromkeys(labels))), head)[1]
        logits, classes = class_logits(rows, labels)
        return logits, [classes.index(label) for label in task.test.labels]

    def _forward(self, model: torch.nn.Module, rows: Examples, head: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits in the order of `rows`; batches are made of texts of like length."""
        if isinstance(self.encoder, TextEncoder):
            order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
            back = torch.tensor(order).argsort()
            features, logits = self._forward_in_order(model, [rows[i] for i in order], head)
            return features[back] if len(features) else features, logits[back]
        return self._forward_in_order(model, rows, head)

    def _forward_in_order(self, model: torch.nn.Module, rows: Examples, head: str) -> tuple[torch.Tensor, torch.Tensor]:
        return features_and_logits(model, batches(self.encoder, rows, self.batch_size), head, self.autocast)

    def score(
        self, merged: Path, head: str | None, tasks: Sequence[Task], *, loss: bool = False, generate: bool = True
    ) -> list[dict[str, float]]:
        """Scores of each task: accuracies of a classifier, or those of `score_rows` for a language model.

        loss: of a classifier also the mean cross-entropy inside the task's own classes, in nats. generate: whether a
        language model generates, for its exact_match.
        """
        model = self.load(merged, head)
        if head is None:
            return self._score_language(model, tasks, generate)
        labels, metric = open_adapter(merged).labels[head], IncrementalAccuracy(keep_in_memory=True)
        classes = list(dict.fromkeys(labels))
        scores = []
        for task in tasks:
            logits, truth = self.logits(model, task, labels, head)
            own = [classes.index(label) for label in task.own]
            scores.append(metric.compute(predictions=logits.numpy(), references=truth, own=own))
            if loss:
                inside = torch.tensor([own.index(row) for row in truth])
                scores[-1]["loss"] = float(cross_entropy(logits[:, own].double(), inside))
        return scores

    def _score_language(self, model: torch.nn.Module, tasks: Sequence[Task], generate: bool) -> list[dict[str, float]]:
        seen = list(dict.fromkeys(answer for task in tasks for answer in task.own))
        assert isinstance(self.encoder, CausalEncoder | Seq2SeqEncoder)
        scores = []
        for task in tasks:
            answers = (task.own, seen if task.own else ())
            found = score_rows(
                *(model, self.encoder, task.test, *answers),
                batch_size=self.batch_size,
                autocast=self.autocast,
                generate=generate,
            )
            scores.append(found)
            self.cut[task.name] = self.encoder.cut
        return scores

    def cut_notes(self, tasks: Sequence[Task]) -> list[str]:
        """What is to be said of test rows that were scored without a part of them."""
        return [
            cut_note(self.cut[task.name], len(task.test), f"test rows of {task.name}")
            for task in tasks
            if self.cut.get(task.name)
        ]


def cut_note(count: int, rows: int, kind: str) -> str:
    """What is to be said of rows that are longer than the model is shown."""
    return f"{count} of {rows} {kind} are longer than stream.max_length and were cut"


LanguageEncoder = CausalEncoder | Seq2SeqEncoder


MOST_SEQUENCES = 192  # prompts times answers in one forward pass


MOST_GENERATED = 64  # tokens; longer completions are not generated to be compared


def score_rows(
    model: nn.Module,
    encoder: LanguageEncoder,
    rows: Rows,
    own: Sequence[str],
    seen: Sequence[str],
    *,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    generate: bool = True,
) -> dict[str, float]:
    """All scores of one task's rows.

    loss, perplexity, bits_per_byte, token_accuracy: see `token_scores`. exact_match: see there; for prompts whose
    completions all have at most 64 tokens, and with `generate`. Where there are answers to choose among:
    class_incremental, the share of the rows whose completion is the likeliest of the answers `seen`, task_incremental
    the same among the task's `own`; an answer's likelihood is the mean log-probability of its tokens, its end included.
    """
    scores = token_scores(model, encoder, rows, batch_size=batch_size, autocast=autocast)
    if generate and any(rows.inputs) and _longest(encoder, rows) <= MOST_GENERATED:
        scores["exact_match"] = exact_match(model, encoder, rows, batch_size=batch_size, autocast=autocast)
    if not seen:
        return scores
    found = answer_likelihoods(model, encoder, rows, seen, batch_size=batch_size, autocast=autocast)
    truth = torch.tensor([list(seen).index(answer) for answer in rows.labels])
    inside = torch.tensor([list(seen).index(answer) for answer in own])
    scores["class_incremental"] = float((found.argmax(1) == truth).double().mean())
    scores["task_incremental"] = float((inside[found[:, inside].argmax(1)] == truth).double().mean())
    return scores


@torch.no_grad()
def token_scores(
    model: nn.Module, encoder: LanguageEncoder, rows: Rows, *, batch_size: int = 16, autocast: torch.dtype | None = None
) -> dict[str, float]:
    """{"loss": mean negative log-likelihood of a target token in nats, over all of them; "perplexity": exp(loss);
    "bits_per_byte": their sum in bits over the UTF-8 bytes of the completions; "token_accuracy": share of the target
    tokens that are the likeliest}. The tokens are those trained on: the completion and its end, cut to max_length.
    """
    examples = encoder.examples(rows)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    total, right, tokens = 0.0, 0, 0
    with _evaluating(model) as device:
        for start in range(0, len(order), batch_size):
            batch = encoder.collate([examples[i] for i in order[start : start + batch_size]])
            with _autocast(device, autocast):
                logits, truth, _ = target_logits(model, {name: value.to(device) for name, value in batch.items()})
            total += float(cross_entropy(logits.float(), truth, reduction="none").double().sum())
            right += int((logits.argmax(-1) == truth).sum())
            tokens += len(truth)
    size = sum(example["bytes"] for example in examples)
    loss = total / tokens
    perplexity = math.exp(min(loss, 700.0))
    bits = total / math.log(2) / size
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "token_accuracy": right / tokens}


@torch.no_grad()
def answer_likelihoods(
    model: nn.Module,
    encoder: LanguageEncoder,
    rows: Rows,
    answers: Sequence[str],
    *,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """Mean log-probability of each answer's tokens after each prompt, (rows, answers) float32.

    A prompt's keys and values (or the encoder's output) are computed once and shared by all answers. A prompt that is
    too long beside the longest answer loses its left.
    """
    after_text = [encoder.completion("", answer) for answer in answers]  # the same after any text
    tokens = [
        after_text if isinstance(prompt, str) else [encoder.completion(prompt, answer) for answer in answers]
        for prompt in rows.inputs
    ]
    tokens = [[ids[: encoder.max_length - 1] for ids in found] for found in tokens]
    prompts = _prompts(encoder, rows, [max(len(ids) for ids in found) for found in tokens])
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    result = torch.empty(len(rows), len(answers))
    size = max(1, min(batch_size, MOST_SEQUENCES // len(answers)))
    with _evaluating(model) as device:
        for start in range(0, len(order), size):
            part = order[start : start + size]
            flat = [ids for i in part for ids in tokens[i]]
            targets = pad_rows(flat, IGNORED).to(device)  # (prompts · answers, U)
            with _autocast(device, autocast):
                found = _likelihoods(model, encoder, [prompts[i] for i in part], targets)
            result[part] = found.reshape(len(part), len(answers)).float().cpu()
    return result


@torch.no_grad()
def exact_match(
    model: nn.Module, encoder: LanguageEncoder, rows: Rows, *, batch_size: int = 16, autocast: torch.dtype | None = None
) -> float:
    """Share of the rows whose greedy generation equals the completion, both stripped of white space at the ends.

    Plain argmax: the checkpoint's generation settings (sampling, penalties) are not used. A generation ends with eos,
    or as the completions of a chat end, or when it is as long as the longest completion.
    """
    longest, ends = _longest(encoder, rows), _ends(encoder, rows)
    prompts = _prompts(encoder, rows, [longest] * len(rows))
    order, right = sorted(range(len(rows)), key=lambda i: len(prompts[i])), 0
    with _evaluating(model) as device:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            with _autocast(device, autocast):
                made = _greedy(model, encoder, [prompts[i] for i in part], longest, ends)
            said = encoder.tokenizer.batch_decode(made, skip_special_tokens=True)
            right += sum(text.strip() == rows.labels[i].strip() for i, text in zip(part, said, strict=True))
    return right / len(rows)


def _prompts(encoder: LanguageEncoder, rows: Rows, room: Sequence[int]) -> list[list[int]]:
    """Token ids of each prompt, those of a causal model with room for so many tokens."""
    prompts = [encoder.prompt(prompt) for prompt in rows.inputs]
    if not isinstance(encoder, CausalEncoder):
        return prompts
    return [encoder.fitted(ids, most) for ids, most in zip(prompts, room, strict=True)]


def _completions(encoder: LanguageEncoder, rows: Rows) -> Iterator[list[int]]:
    return (encoder.completion(prompt, text) for prompt, text in zip(rows.inputs, rows.labels, strict=True))


def _longest(encoder: LanguageEncoder, rows: Rows) -> int:
    """Tokens of the longest completion, its end included, as far as it fits."""
    return min(max(len(ids) for ids in _completions(encoder, rows)), encoder.max_length - 1)


def _ends(encoder: LanguageEncoder, rows: Rows) -> set[int]:
    """Token ids that end a completion: eos, and the special token that ends a turn of the chat template."""
    known = encoder.tokenizer.added_tokens_decoder
    last = {ids[-1] for ids in _completions(encoder, rows) if ids}
    return {encoder.tokenizer.eos_token_id} | {token for token in last if token in known and known[token].special}


def _greedy(
    model: nn.Module, encoder: LanguageEncoder, prompts: list[list[int]], longest: int, ends: set[int]
) -> list[list[int]]:
    """The likeliest token, again and again, up to an end (left out) or `longest` tokens, for each prompt."""
    causal, device = isinstance(encoder, CausalEncoder), next(model.parameters()).device
    ids, mask = _padded(prompts, encoder.pad, device, left=causal)
    said = torch.empty(len(prompts), 0, dtype=torch.long, device=device)
    if causal:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    else:
        states = BaseModelOutput(
            transformer_of(model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        )
        first = ids.new_full((len(ids), 1), transformer_of(model).config.decoder_start_token_id)
        feed = {"encoder_outputs": states, "attention_mask": mask, "decoder_input_ids": first}
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(ends), device=device)
    while said.shape[1] < longest and not ended.all():
        out = model(**feed, use_cache=True)
        token = out.logits[:, -1].argmax(-1)
        ended |= torch.isin(token, stops)
        said = torch.cat([said, token.where(~ended, token.new_tensor(IGNORED))[:, None]], 1)
        feed["decoder_input_ids" if not causal else "input_ids"] = token[:, None]
        feed["past_key_values"] = out.past_key_values
        if causal:
            feed["attention_mask"] = torch.cat([feed["attention_mask"], mask[:, :1] * 0 + 1], 1)
            feed["position_ids"] = feed["position_ids"][:, -1:] + 1
    return [[token for token in row if token != IGNORED] for row in said.tolist()]


def _padded(rows: list[list[int]], value: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids (N, T) and their mask."""
    mask = pad_rows([[1] * len(row) for row in rows], 0, left=left)
    return pad_rows(rows, value, left=left).to(device), mask.to(device)


def _likelihoods(model: nn.Module, encoder: LanguageEncoder, prompts: list[list[int]], targets: Tensor) -> Tensor:
    if isinstance(encoder, CausalEncoder):
        return _after_prompts(model, encoder, prompts, targets)
    return _after_encoder(model, encoder, prompts, targets)


def _after_prompts(model: nn.Module, encoder: CausalEncoder, prompts: list[list[int]], targets: Tensor) -> Tensor:
    """(prompts · answers,): the answers are fed after the prompts' cached keys and values."""
    device, copies = targets.device, len(targets) // len(prompts)
    ids, mask = _padded(prompts, encoder.pad, device, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    first = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = first.past_key_values
    cache.batch_repeat_interleave(copies)
    known = targets != IGNORED
    mask, last = mask.repeat_interleave(copies, 0), positions[:, -1:].repeat_interleave(copies, 0)
    start = first.logits[:, -1].float().log_softmax(-1).repeat_interleave(copies, 0)
    total = start.gather(1, targets[:, :1])[:, 0]  # every answer has a first token
    if targets.shape[1] > 1:
        with logits_only_at(model, known[:, 1:]):
            rest = model(
                input_ids=targets.where(known, targets.new_tensor(encoder.pad))[:, :-1],
                attention_mask=torch.cat([mask, known[:, :-1].to(mask.dtype)], 1),
                position_ids=last + 1 + torch.arange(targets.shape[1] - 1, device=device),
                past_key_values=cache,
                use_cache=True,
            ).logits[0]
        total = total + _sums(rest, targets[:, 1:], known[:, 1:])
    return total / known.sum(1)


def _after_encoder(model: nn.Module, encoder: Seq2SeqEncoder, prompts: list[list[int]], targets: Tensor) -> Tensor:
    """(prompts · answers,): the answers are decoded from the prompts' encoder states."""
    device, copies = targets.device, len(targets) // len(prompts)
    ids, mask = _padded(prompts, encoder.pad, device, left=False)
    states = transformer_of(model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    known = targets != IGNORED
    with logits_only_at(model, known):
        logits = model(
            encoder_outputs=BaseModelOutput(states.repeat_interleave(copies, 0)),
            attention_mask=mask.repeat_interleave(copies, 0),
            decoder_input_ids=transformer_of(model).prepare_decoder_input_ids_from_labels(labels=targets),
            use_cache=False,
        ).logits[0]
    return _sums(logits, targets, known) / known.sum(1)


def _sums(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Sum of the log-probabilities of each row's known targets (n, U) under logits (known positions, V)."""
    losses = cross_entropy(logits.float(), targets[known], reduction="none")
    return torch.zeros(len(targets), device=losses.device).index_add(0, known.nonzero()[:, 0], -losses)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode inside the block; yields the model's device."""
    mode = model.training
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        model.train(mode)


def _autocast(device: torch.device, autocast: torch.dtype | None):
    return torch.autocast(device.type, autocast) if autocast else nullcontext()


@torch.no_grad()
def features_and_logits(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], head: str, autocast: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(features (n, d), logits (n, C)) in float32 and eval mode; the features are the input of the head's Linear."""
    features: list[Tensor] = []
    logits: list[Tensor] = []
    device = next(model.parameters()).device
    mode = model.training

    def keep(_: nn.Module, args: tuple) -> None:
        if args[0].ndim == 2:  # a head that sees every token has no pooled feature
            features.append(args[0].float().cpu())

    handle = find_head(model, head).register_forward_pre_hook(keep)
    model.eval()
    try:
        for batch in batches:
            inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            with torch.autocast(device.type, autocast) if autocast else nullcontext():
                logits.append(model(**inputs).logits.float().cpu())
    finally:
        handle.remove()
        model.train(mode)
    return torch.cat(features) if features else torch.empty(0), torch.cat(logits)

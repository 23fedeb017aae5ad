"""Scores of a language model on prompts and completions: loss, exact match, and which of some answers is likeliest."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder, pad_rows
from pm_hf.data.pool import SOFT_TOKENS, SOFT_WEIGHTS, hard_targets, soft_collate, without_soft_targets
from pm_hf.data.rows import Rows
from pm_hf.models.contexts import autocast, evaluating, logits_only_at
from pm_hf.models.language_model import IGNORED, soft_cross_entropy, target_logits
from pm_hf.models.sharded import transformer_of

LanguageEncoder = CausalEncoder | Seq2SeqEncoder

MOST_SEQUENCES = 192  # prompts times answers in one forward pass
MOST_GENERATED = 64  # tokens; longer completions are not generated to be compared


@dataclass(frozen=True)
class LanguageScorer:
    """Scores of one model, in eval mode and batches of rows of like length; `precision`: the dtype of autocast."""

    model: nn.Module
    encoder: LanguageEncoder
    batch_size: int = 16
    precision: torch.dtype | None = None
    right: list[bool] = field(default_factory=list)  # of the rows scored last: whether the answer is the likeliest one

    @property
    def device(self) -> torch.device:
        """That of the model."""
        return next(self.model.parameters()).device

    def scores(
        self, rows: Rows, task_labels: Sequence[str], seen_labels: Sequence[str], *, generate: bool = True
    ) -> dict[str, float]:
        """All scores of one task's rows.

        loss, perplexity, bits_per_byte, token_accuracy: see `token_scores`. exact_match: see there; for prompts whose
        completions all have at most 64 tokens, and with `generate`. Where there are answers to choose among:
        class_incremental, the share of the rows whose completion is the likeliest of `seen_labels`, task_incremental
        the same among `task_labels`; an answer's likelihood is the mean log-probability of its tokens, its end
        included.
        """
        scores = self.token_scores(rows)
        if generate and any(rows.inputs):
            completions = list(self.encoder.completions(rows))
            if _longest(self.encoder, completions) <= MOST_GENERATED:
                scores["exact_match"] = self._exact_match(rows, completions)
        if not seen_labels:
            return scores
        likelihoods = self.answer_likelihoods(rows, seen_labels)
        truth = torch.tensor([list(seen_labels).index(answer) for answer in rows.labels])
        inside = torch.tensor([list(seen_labels).index(answer) for answer in task_labels])
        self.right[:] = (likelihoods.argmax(1) == truth).tolist()
        scores["class_incremental"] = fmean(self.right)
        scores["task_incremental"] = float((inside[likelihoods[:, inside].argmax(1)] == truth).double().mean())
        return scores

    @torch.no_grad()
    def token_scores(self, rows: Rows) -> dict[str, float]:
        """{"loss": mean negative log-likelihood of a target token in nats, over all of them; "perplexity": exp(loss);
        "bits_per_byte": their sum in bits over the UTF-8 bytes of the completions; "token_accuracy": share of the
        target tokens that are the likeliest}. The tokens are those trained on: the completion and its end, cut to
        max_length.
        """
        examples = self.encoder.examples(rows)
        total, right, tokens = 0.0, 0, 0
        with evaluating(self.model):
            for part in self._parts([len(example["input_ids"]) for example in examples], self.batch_size):
                batch = self.encoder.collate([examples[i] for i in part])
                batch = {name: value.to(self.device) for name, value in batch.items()}
                with autocast(self.device, self.precision):
                    logits, truth, _ = target_logits(self.model, batch)
                total += float(cross_entropy(logits.float(), truth, reduction="none").double().sum())
                right += int((logits.argmax(-1) == truth).sum())
                tokens += len(truth)
        size = sum(example["bytes"] for example in examples)
        loss = total / tokens
        perplexity = math.exp(min(loss, 700.0))
        bits = total / math.log(2) / size
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "token_accuracy": right / tokens}

    def answer_likelihoods(self, rows: Rows, answers: Sequence[str]) -> Tensor:
        """Mean log-probability of each answer's tokens after each prompt, (rows, answers) float32.

        A prompt's keys and values (or the encoder's output) are computed once and shared by all answers. A prompt that
        is too long beside the longest answer loses its left.
        """
        return self._likelihoods_of(rows, self._answer_tokens(rows, answers), len(answers))

    @torch.no_grad()
    def _likelihoods_of(self, rows: Rows, tokens: list[list[list[int]]], count: int) -> Tensor:
        """The same of the `count` answers' tokens after each prompt."""
        prompts = _prompts(self.encoder, rows, [max(len(ids) for ids in of_prompt) for of_prompt in tokens])
        result = torch.empty(len(rows), count)
        size = max(1, min(self.batch_size, MOST_SEQUENCES // count))
        with evaluating(self.model):
            for part in self._parts([len(prompt) for prompt in prompts], size):
                flat = [ids for i in part for ids in tokens[i]]
                targets = pad_rows(flat, IGNORED).to(self.device)  # (prompts · answers, U)
                with autocast(self.device, self.precision):
                    likelihoods = _likelihoods(self.model, self.encoder, [prompts[i] for i in part], targets)
                result[part] = likelihoods.reshape(len(part), count).float().cpu()
        return result

    def answer_probabilities(self, rows: Rows, answers: Sequence[str]) -> Tensor:
        """Probability of each answer after each prompt, given that it is one of them, (rows, answers) float32: the
        softmax of the log-probabilities, which are sums over the answers' tokens."""
        tokens = self._answer_tokens(rows, answers)
        sizes = [[float(len(ids)) for ids in of_prompt] for of_prompt in tokens]
        return (self._likelihoods_of(rows, tokens, len(answers)) * torch.tensor(sizes)).softmax(1)

    @torch.no_grad()
    def row_losses(self, examples: Sequence[dict]) -> Tensor:
        """Mean over the target tokens of each example's cross-entropy, (n,) float64, in nats; that of the soft targets
        where an example has `soft` (see `pm_hf.data.pool`)."""
        losses = torch.empty(len(examples), dtype=torch.float64)
        for part, batch, logits, of_example in self._targets(examples):
            values = soft_cross_entropy(logits, batch[SOFT_TOKENS], batch[SOFT_WEIGHTS])
            sums = torch.zeros(2, len(part), dtype=torch.float64, device=values.device)
            sums.index_add_(1, of_example, torch.stack([values, torch.ones_like(values)]).double())
            losses[part] = (sums[0] / sums[1]).cpu()
        return losses

    @torch.no_grad()
    def likeliest_tokens(self, examples: Sequence[dict], count: int) -> list[list[dict[int, float]]]:
        """Of each target token of each example: {token id: probability} of the `count` likeliest in its place."""
        tokens: list[list[dict[int, float]]] = [[] for _ in examples]
        for part, _, logits, of_example in self._targets(examples):
            best = logits.softmax(1).topk(min(count, logits.shape[1]))
            for row, ids, values in zip(of_example.tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
                tokens[part[row]].append(dict(zip(ids, values, strict=True)))
        return tokens

    def _targets(self, examples: Sequence[dict]) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor, Tensor]]:
        """(examples of a batch, the batch, logits (n, V) float32 at its target tokens, example of each (n,))."""
        collate = soft_collate(self.encoder.collate)
        with evaluating(self.model):
            for part in self._parts([len(example["input_ids"]) for example in examples], self.batch_size):
                batch = collate([{"soft": hard_targets(examples[i]), **examples[i]} for i in part])
                batch = {name: value.to(self.device) for name, value in batch.items()}
                with autocast(self.device, self.precision):
                    logits, _, of_example = target_logits(self.model, without_soft_targets(batch))
                yield part, batch, logits.float(), of_example

    @torch.no_grad()
    def prompt_states(self, rows: Rows, layers: Sequence[int] | None = None) -> Tensor:
        """Hidden state of each prompt's last token after the transformer's `layers`, (layers, rows, d) float32.

        Layers count from 1; None: all of them. Those of an encoder-decoder model are its encoder's. The logits are
        computed at the last tokens only, and thrown away.
        """
        prompts, parts = self.encoder.prompts(rows), list[Tensor]()
        order = list(self._parts([len(prompt) for prompt in prompts], self.batch_size))
        with evaluating(self.model):
            for part in order:
                ids, mask = _padded([prompts[i] for i in part], self.encoder.pad, self.device, left=False)
                with autocast(self.device, self.precision):
                    states = _states(self.model, self.encoder, ids, mask)
                wanted = range(1, len(states)) if layers is None else layers
                rest = torch.arange(len(part), device=self.device), mask.sum(1) - 1
                parts.append(torch.stack([states[layer][rest].float().cpu() for layer in wanted]))
        back = torch.tensor([i for part in order for i in part]).argsort()
        return torch.cat(parts, 1)[:, back]

    def exact_match(self, rows: Rows) -> float:
        """Share of the rows whose greedy generation equals the completion, both stripped of white space at the ends.

        Plain argmax: the checkpoint's generation settings (sampling, penalties) are not used. A generation ends with
        eos, or as the completions of a chat end, or when it is as long as the longest completion.
        """
        return self._exact_match(rows, list(self.encoder.completions(rows)))

    def _exact_match(self, rows: Rows, completions: Sequence[list[int]]) -> float:
        said = self.completions(rows, _longest(self.encoder, completions), self.encoder.ends(completions))
        wanted = [self.encoder.compared(prompt, label) for prompt, label in zip(rows.inputs, rows.labels, strict=True)]
        return sum(text.strip() == whole.strip() for text, whole in zip(said, wanted, strict=True)) / len(rows)

    @torch.no_grad()
    def completions(self, prompts: Rows, longest: int, ends: set[int]) -> list[str]:
        """The greedy generation after each prompt, up to one of `ends` or `longest` tokens."""
        ids = _prompts(self.encoder, prompts, [longest] * len(prompts))
        texts = [""] * len(prompts)
        with evaluating(self.model):
            for part in self._parts([len(prompt) for prompt in ids], self.batch_size):
                with autocast(self.device, self.precision):
                    made = _greedy(self.model, self.encoder, [ids[i] for i in part], longest, ends)
                said = self.encoder.tokenizer.batch_decode(made, skip_special_tokens=True)
                for i, text in zip(part, said, strict=True):
                    texts[i] = text
        return texts

    def _parts(self, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
        """Indices of the rows of each batch, in the order of their lengths."""
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        return (order[start : start + size] for start in range(0, len(order), size))

    def _answer_tokens(self, rows: Rows, answers: Sequence[str]) -> list[list[list[int]]]:
        """Token ids of every answer after every prompt, as many as fit."""
        encoder = self.encoder
        after_text = [encoder.completion("", answer) for answer in answers]  # the same after any text
        tokens = [
            after_text if isinstance(prompt, str) else [encoder.completion(prompt, answer) for answer in answers]
            for prompt in rows.inputs
        ]
        return [[ids[: encoder.max_length - 1] for ids in of_prompt] for of_prompt in tokens]


def _prompts(encoder: LanguageEncoder, rows: Rows, room: Sequence[int]) -> list[list[int]]:
    """Token ids of each prompt, as it is kept beside a completion of so many tokens."""
    return [encoder.fitted(encoder.prompt(prompt), most) for prompt, most in zip(rows.inputs, room, strict=True)]


def _longest(encoder: LanguageEncoder, completions: Iterable[list[int]]) -> int:
    """Tokens of the longest completion, its end included, as far as it fits."""
    return min(max(map(len, completions)), encoder.max_length - 1)


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


def _states(model: nn.Module, encoder: LanguageEncoder, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The hidden states (N, T, d) of prompts (N, T) that are padded on the right: the embeddings, then each layer's."""
    if not isinstance(encoder, CausalEncoder):
        whole = transformer_of(model).get_encoder()
        return tuple(whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states)
    last = torch.arange(ids.shape[1], device=ids.device) == (mask.sum(1) - 1)[:, None]
    with logits_only_at(model, last):
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    return tuple(out.hidden_states)


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
    real = targets != IGNORED
    mask, last = mask.repeat_interleave(copies, 0), positions[:, -1:].repeat_interleave(copies, 0)
    start = first.logits[:, -1].float().log_softmax(-1).repeat_interleave(copies, 0)
    total = start.gather(1, targets[:, :1])[:, 0]  # every answer has a first token
    if targets.shape[1] > 1:
        with logits_only_at(model, real[:, 1:]):
            logits = model(
                input_ids=targets.where(real, targets.new_tensor(encoder.pad))[:, :-1],
                attention_mask=torch.cat([mask, real[:, :-1].to(mask.dtype)], 1),
                position_ids=last + 1 + torch.arange(targets.shape[1] - 1, device=device),
                past_key_values=cache,
                use_cache=True,
            ).logits[0]
        total = total + _sums(logits, targets[:, 1:], real[:, 1:])
    return total / real.sum(1)


def _after_encoder(model: nn.Module, encoder: Seq2SeqEncoder, prompts: list[list[int]], targets: Tensor) -> Tensor:
    """(prompts · answers,): the answers are decoded from the prompts' encoder states."""
    device, copies = targets.device, len(targets) // len(prompts)
    ids, mask = _padded(prompts, encoder.pad, device, left=False)
    states = transformer_of(model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    real = targets != IGNORED
    with logits_only_at(model, real):
        logits = model(
            encoder_outputs=BaseModelOutput(states.repeat_interleave(copies, 0)),
            attention_mask=mask.repeat_interleave(copies, 0),
            decoder_input_ids=transformer_of(model).prepare_decoder_input_ids_from_labels(labels=targets),
            use_cache=False,
        ).logits[0]
    return _sums(logits, targets, real) / real.sum(1)


def _sums(logits: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """Sum of the log-probabilities of each row's own targets (n, U) under logits (their number, V)."""
    losses = cross_entropy(logits.float(), targets[real], reduction="none")
    return torch.zeros(len(targets), device=losses.device).index_add(0, real.nonzero()[:, 0], -losses)

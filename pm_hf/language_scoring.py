"""Scores of a language model on prompts and completions: likelihood, choice among answers, generation."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutput

from pm_hf.language import IGNORED, CausalEncoder, Seq2SeqEncoder, pad_rows
from pm_hf.rows import Rows
from pm_hf.targets import bare, only_positions, target_logits

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
            with _precision(device, autocast):
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
            with _precision(device, autocast):
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
            with _precision(device, autocast):
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
        states = BaseModelOutput(bare(model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state)
        first = ids.new_full((len(ids), 1), bare(model).config.decoder_start_token_id)
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
        with only_positions(model, known[:, 1:]):
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
    states = bare(model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    known = targets != IGNORED
    with only_positions(model, known):
        logits = model(
            encoder_outputs=BaseModelOutput(states.repeat_interleave(copies, 0)),
            attention_mask=mask.repeat_interleave(copies, 0),
            decoder_input_ids=bare(model).prepare_decoder_input_ids_from_labels(labels=targets),
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


def _precision(device: torch.device, autocast: torch.dtype | None):
    return torch.autocast(device.type, autocast) if autocast else nullcontext()

"""The writer: an adapter of the untouched base that writes texts like those of a task."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TrainerCallback,
)

from pm_hf.config.schema import LoraSettings, PerturbationSettings, RunConfig
from pm_hf.data.chat import Prompt
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder, pad_rows
from pm_hf.data.pool import targets
from pm_hf.data.rows import Rows
from pm_hf.distributed import gather, on_all_processes, process_count, process_index
from pm_hf.models.contexts import seeded
from pm_hf.models.loading import load_base, load_merged
from pm_hf.models.quantized import is_quantized
from pm_hf.models.task_model import TaskModel, build_task_model, task_tensors
from pm_hf.training.task_trainer import precision, train, training_arguments

WRITER_RANK, WRITER_ALPHA = 8, 16
WRITER_TRAINING = {"learning_rate": 1e-3, "num_train_epochs": 4}
WRITER_BATCH = 8  # rows of a step, of all processes together
SAME_AS_SOLVER = ("bf16", "fp16", "tf32", "use_cpu", "gradient_checkpointing", "gradient_checkpointing_kwargs")
TOP_P = 0.95
NUCLEUS = 512  # tokens among which the top-p ones are looked for first
WRITING_BATCH = 32  # texts that are written at once


class Writer:
    """Writes a text for each prompt: temperature 1, top-p .95, up to an end or `longest` tokens.

    model: without adapters, in the dtype to write in. ends: token ids that end a text.
    """

    def __init__(
        self, model: PreTrainedModel, encoder: CausalEncoder | Seq2SeqEncoder, ends: Sequence[int], longest: int
    ) -> None:
        self.model, self.encoder, self.ends, self.longest = model.eval(), encoder, list(ends), longest

    def write(self, prompts: Sequence[Prompt], key: str) -> list[str]:
        """One text for each prompt, in their order; a pure function of the weights, the prompts and the key.

        Prompts of like length are written together, with a cache of keys and values. The batches are shared out among
        the processes, whose number changes nothing; all must call this.
        """
        ids = [self.encoder.fitted(self.encoder.prompt(prompt), self.longest) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda at: len(ids[at]))
        parts = [order[start : start + WRITING_BATCH] for start in range(0, len(order), WRITING_BATCH)]

        def own() -> dict[int, str]:
            texts: dict[int, str] = {}
            for number in range(process_index(), len(parts), process_count()):
                part = parts[number]
                texts |= zip(part, self._batch([ids[at] for at in part], f"{key}/{number}"), strict=True)
            return texts

        texts = {at: text for of_process in gather(on_all_processes(own)) for at, text in of_process.items()}
        return [texts[at] for at in range(len(prompts))]

    @torch.no_grad()
    def _batch(self, ids: list[list[int]], key: str) -> list[str]:
        with seeded(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")):
            said = self._decoded_alone(ids) if isinstance(self.encoder, CausalEncoder) else self._from_encoder(ids)
        return self.encoder.tokenizer.batch_decode(said, skip_special_tokens=True)

    def _decoded_alone(self, ids: list[list[int]]) -> list[list[int]]:
        """Tokens after each prompt of a causal model. Whenever half of the texts have ended, the others go on without
        them, with their keys and values."""
        tokens, mask = self._padded(ids, left=True)
        start, left, cache = tokens.shape[1], list(range(len(ids))), None
        said: list[list[int]] = [[] for _ in ids]
        while left:
            out = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=self._settings(self.longest + start - tokens.shape[1]),
                logits_processor=LogitsProcessorList([Nucleus(TOP_P)]),
                stopping_criteria=StoppingCriteriaList([HalfEnded(self.ends, start)]),
            )
            tokens, cache = out.sequences, out.past_key_values
            ended = _ended(tokens[:, start:], self.ends) | (tokens.shape[1] - start >= self.longest)
            for place in ended.nonzero()[:, 0].tolist():
                said[left[place]] = tokens[place, start:].tolist()
            going = (~ended).nonzero()[:, 0]
            left = [left[place] for place in going.tolist()]
            if left:
                cache.batch_select_indices(going)
                mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])], 1)[going]
                tokens = tokens[going]
        return said

    def _from_encoder(self, ids: list[list[int]]) -> list[list[int]]:
        """Tokens that an encoder-decoder model says of each prompt."""
        tokens, mask = self._padded(ids, left=False)
        nucleus = LogitsProcessorList([Nucleus(TOP_P)])
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            generation_config=self._settings(self.longest),
            logits_processor=nucleus,
        )
        return out.sequences.tolist()

    def _padded(self, ids: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        mask = pad_rows([[1] * len(row) for row in ids], 0, left=left)
        return pad_rows(ids, self.encoder.pad, left=left).to(device), mask.to(device)

    def _settings(self, longest: int) -> GenerationConfig:
        """Plain draws from the model's distribution; nothing of the checkpoint's own settings."""
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=longest,
            eos_token_id=self.ends,
            pad_token_id=self.encoder.pad,
            decoder_start_token_id=getattr(self.model.config, "decoder_start_token_id", None),
            use_cache=True,
            return_dict_in_generate=True,
        )


class Nucleus(LogitsProcessor):
    """Leaves the likeliest tokens that together have the probability `share`, at least one: transformers' `top_p`.

    That sorts the whole vocabulary, which takes as long as the model does; this the 512 likeliest tokens, and the whole
    only for rows where they are not enough. Equal tokens at the edge all stay.
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: logits (N, V); those of tokens that are left out become -inf."""
        p = scores.float().softmax(-1)
        edge, enough = self._edge(p, min(NUCLEUS, p.shape[1]))
        if not bool(enough.all()):
            edge[~enough] = self._edge(p[~enough], p.shape[1])[0]
        return scores.masked_fill(p < edge, -math.inf)

    def _edge(self, p: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(smallest probability that stays (N, 1), whether it is among the `count` largest (N,))."""
        best = p.topk(count).values
        before = best.cumsum(-1) - best
        edge = best.masked_fill(before >= self.share, math.inf).amin(-1, keepdim=True)
        return edge, (before[:, -1] >= self.share) | (count == p.shape[1])


class HalfEnded(StoppingCriteria):
    """Ends the generation of all texts of a batch when half of them have ended."""

    def __init__(self, ends: Sequence[int], start: int) -> None:
        self.ends, self.start = ends, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each row (N,) is done."""
        ended = _ended(input_ids[:, self.start :], self.ends)
        return ended | (2 * ended.sum() >= len(ended))


def _ended(said: Tensor, ends: Sequence[int]) -> Tensor:
    """Whether an end stands in each row (N,) of tokens (N, T)."""
    return torch.isin(said, torch.tensor(ends, device=said.device)).any(1)


@dataclass(frozen=True)
class WriterAdapter:
    """What a writer is beside the base. factors, config: of its adapter, as PEFT stores them; ends, longest: see
    `Writer`."""

    factors: dict[str, Tensor]
    config: dict[str, Any]
    ends: tuple[int, ...]
    longest: int


def train_writer(
    config: RunConfig,
    rows: Rows,
    encoder: CausalEncoder | Seq2SeqEncoder,
    index: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Writer, WriterAdapter]:
    """A writer trained on sources and texts (`WritingForm.training`), from the base without any adapter.

    LoRA of rank 8 on the run's target modules, learning rate 1e-3, 4 epochs, batches of 8 (of all processes together,
    as far as their number divides it); no perturbation. All processes train together. folder: where the trainer leaves
    a checkpoint if it is told to stop.
    """
    same = {name: config.training[name] for name in SAME_AS_SOLVER if name in config.training}
    each = {"per_device_train_batch_size": max(1, WRITER_BATCH // process_count())}
    settings = replace(
        config,
        training={**same, **each, **WRITER_TRAINING, "save_strategy": "no", "logging_strategy": "no"},
        perturbation=PerturbationSettings(scale=0.0),
    )

    def build() -> TaskModel:
        return build_task_model(
            config.model,
            LoraSettings(r=WRITER_RANK, alpha=WRITER_ALPHA, target_modules=config.lora.target_modules),
            (),
            None,
            config.seed,
            index,
            kind=config.stream.kind,
        )

    built, args = on_all_processes(build), training_arguments(settings, folder, index)
    examples = on_all_processes(lambda: encoder.training(rows))
    train(built, examples, encoder.collate, args, callbacks=callbacks)
    factors, _, peft_config = task_tensors(built.model, config.stream.kind)
    ends = tuple(sorted(encoder.ends(encoder.completions(rows))))
    longest = max(len(targets(example)) for example in examples)
    model = _folded(built.model, precision(args))
    return Writer(model, encoder, ends, longest), WriterAdapter(factors, peft_config, ends, longest)


def load_writer(
    folder: Path,
    config: RunConfig,
    encoder: CausalEncoder | Seq2SeqEncoder,
    ends: Sequence[int],
    longest: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Writer:
    """The writer whose adapter is in a folder, on a device: the weights of the one that was trained, bit for bit."""
    model = load_merged(config.model, folder, (), config.stream.kind).to(device)
    return Writer(_folded(model, dtype), encoder, ends, longest)


def base_writer(config: RunConfig, encoder: CausalEncoder, longest: int, dtype: torch.dtype | None) -> Writer:
    """The untouched base, which writes what it likes."""
    model, _ = load_base(config.model, (), config.seed, config.stream.kind)
    return Writer(_cast(model, dtype), encoder, sorted(encoder.ends(())), longest)


def _folded(model: PeftModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with its adapter in the weights, in the dtype to write in. Quantized weights cannot hold it: there it
    stays beside them."""
    base = model.get_base_model()
    return _cast(base if is_quantized(base) else model.merge_and_unload(), dtype)


def _cast(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Weights in the dtype of autocast are read once a token, it would cast them every time. Quantized ones stay."""
    return model if dtype is None or is_quantized(model) else model.to(dtype)

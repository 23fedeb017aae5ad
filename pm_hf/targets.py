"""Logits of a language model at the positions that predict a target token, and nowhere else."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pm_hf.errors import InputError
from pm_hf.language import IGNORED


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and compiled modules, however they are nested."""
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    inner = model.module if parallel else model._modules.get("_orig_mod")
    return model if inner is None else unwrapped(inner)


def bare(model: Any) -> Any:
    """The transformers model inside a PeftModel, DistributedDataParallel or a compiled module."""
    model = unwrapped(model)
    return unwrapped(model.get_base_model()) if hasattr(model, "get_base_model") else model


def is_language(batch: Mapping[str, Any]) -> bool:
    """Whether a batch's labels are token ids (N, T), not classes (N,)."""
    return batch["labels"].ndim == 2


def target_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (n, V), target token (n,), example (n,)) of the n target positions of a batch, example by example.

    Causal models predict token t + 1 at t; encoder-decoder models predict labels[t] at t. The output embedding sees the
    n positions only, so nothing as large as (N, T, V) exists.
    """
    encoder_decoder = bool(bare(model).config.is_encoder_decoder)
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if encoder_decoder:
        inputs["decoder_input_ids"] = bare(model).prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        inputs["use_cache"] = False  # type: ignore[assignment]
    mask = target_mask(labels, shifted=not encoder_decoder)
    aim = labels if encoder_decoder else labels.roll(-1, dims=1)
    with only_positions(model, mask):
        logits = model(**inputs).logits
    return logits.reshape(-1, logits.shape[-1]), aim[mask], mask.nonzero()[:, 0]


def target_mask(labels: Tensor, *, shifted: bool) -> Tensor:
    """(N, T) bool: where the logits predict a target token, labels[t + 1] where `shifted`, else labels[t]."""
    known = labels != IGNORED
    return torch.cat([known[:, 1:], known.new_zeros(len(known), 1)], dim=1) if shifted else known


@contextmanager
def only_positions(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside the block the output embedding sees the hidden states (N, T, d) at `mask` (N, T) only, as (1, n, d)."""
    head = bare(model).get_output_embeddings()
    if head is None:
        raise InputError(f"{type(bare(model)).__name__} has no output embedding, so it is no language model")

    def select(_: nn.Module, args: tuple) -> tuple:
        return (args[0][mask][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()

"""Temporary states of a model, each restored on any exception, and the rule that keeps 4-bit layers differentiable."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pm_hf.errors import InputError
from pm_hf.models.sharded import transformer_of


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def gradients_put_aside(model: nn.Module) -> Iterator[None]:
    """The trainable parameters have no gradient where the block begins, and afterwards the one that they had."""
    gradients = {parameter: parameter.grad for parameter in model.parameters() if parameter.requires_grad}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside the block; the global state is left as it was, that of every GPU too."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """torch.autocast to `dtype` on a device, nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def scaled_adapter(layers: list[LoraLayer], adapter: str, factor: float) -> Iterator[None]:
    """Scale one adapter's LoRA product by `factor` while the block runs; restored on any exception.

    The block must enclose the backward pass too: activation checkpointing runs the forward again inside it. The
    gradient of A and B carries the factor, as the derivative of L(W + factor·s·BA) does. Weights are not touched.
    """
    before = [layer.scaling[adapter] for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[adapter] = scaling * factor
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[adapter] = scaling


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model without any LoRA product and in eval mode, saved modules as they are; restored on any exception."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    disabled = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        with evaluating(model):
            yield
    finally:
        for layer, before in zip(layers, disabled, strict=True):
            layer._disable_adapters = before


@contextmanager
def logits_only_at(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside the block the output embedding sees the hidden states (N, T, d) at `mask` (N, T) only, as (1, n, d)."""
    head = transformer_of(model).get_output_embeddings()
    if head is None:
        raise InputError(f"{type(transformer_of(model)).__name__} has no output embedding, so it is no language model")

    def select(_: nn.Module, args: tuple) -> tuple:
        return (args[0][mask][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the report of newly initialised weights (they are in the adapter) and what PEFT says of its own doing."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*which is a no-op.*", category=UserWarning)  # without weights
            warnings.filterwarnings("ignore", message="Found missing adapter keys.*", category=UserWarning)  # refused
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but.*", category=UserWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False.*Conv1D", category=UserWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


# attribute of bitsandbytes' 4-bit layers, true where they would lay their weights out anew
PACKING_FLAG = "support_avx512bf16_for_cpu"


def keep_differentiable(model: nn.Module) -> None:
    """Switch off the layout that 4-bit weights take on some CPUs in a forward pass in eval mode without gradients.

    No gradient passes the weights in it, in training either, and bitsandbytes 0.50 neither goes back nor fails: after
    one evaluation everything below such a layer would stop learning. InputError where it was taken already: it rounds
    the scales of the weights, so there is no way back.
    """
    for name, layer in model.named_modules():
        if getattr(layer, PACKING_FLAG, False):
            if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
                raise InputError(
                    f"the 4-bit weights of {name} were laid out for inference by a forward pass without gradients, and "
                    "no gradient passes them any more; load the base again and evaluate it after this"
                )
            setattr(layer, PACKING_FLAG, False)

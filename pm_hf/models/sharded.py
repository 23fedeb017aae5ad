"""What is around a model: wrappers, and weights that are spread over the processes (FSDP2, DeepSpeed ZeRO-3)."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import unset_hf_deepspeed_config

from pm_hf.adapters.layout import PEFT_PREFIX
from pm_hf.adapters.names import without_wrappers

SAVED_WRAPPER = "modules_to_save"  # module of PEFT that holds a copy of the wrapped one for each adapter


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only parts of the model's parameters."""
    return any(isinstance(value, DTensor) or hasattr(value, "ds_id") for value in model.parameters())


def load_whole() -> None:
    """Models are loaded whole from here on; a training by ZeRO-3 lets transformers spread every model it loads."""
    unset_hf_deepspeed_config()


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """{plain name: whole value on the CPU} of the trainable parameters; a call for all processes at once."""
    return {plain_name(name): gather_whole(value) for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `trained_weights` into a model that is not sharded; RuntimeError where the names or shapes differ."""
    expected = {plain_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    odd = [name for name in expected if name not in weights or weights[name].shape != expected[name].shape]
    if odd or len(weights) != len(expected):
        raise RuntimeError(f"the gathered weights do not fit the model, first {(odd or sorted(weights))[0]}")
    for name, value in expected.items():
        value.copy_(weights[name])


def gather_whole(value: Tensor) -> Tensor:
    """A parameter as every process holds it, on the CPU; of a sharded one all processes must ask together."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if hasattr(value, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters([value]):
            return value.detach().cpu().clone()
    return value.detach().cpu().clone()


@torch.no_grad()
def assign_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole value, which every process has, into a parameter or into this process's part of it."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(value)


def plain_name(name: str) -> str:
    """Name of a parameter or module in the base model, as an adapter's file has it behind PEFT's prefix: without what
    DDP, torch.compile, activation checkpointing and PEFT (its prefix, `modules_to_save.<adapter>`) put into it."""
    parts = without_wrappers(name).removeprefix("module.").removeprefix(PEFT_PREFIX).split(".")
    if SAVED_WRAPPER in parts:
        at = parts.index(SAVED_WRAPPER)
        parts = parts[:at] + parts[at + 2 :]
    return ".".join(parts)


def shard_on_cpu(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Let accelerate shard on CPUs, where it would train by DDP without a word; torch's FSDP2 works there over gloo."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def local_part(value: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and compiled modules, however they are nested."""
    parallel = isinstance(model, nn.parallel.DistributedDataParallel)
    inner = model.module if parallel else model._modules.get("_orig_mod")
    return model if inner is None else unwrapped(inner)


def transformer_of(model: Any) -> Any:
    """The transformers model inside a PeftModel, DistributedDataParallel or a compiled module."""
    model = unwrapped(model)
    return unwrapped(model.get_base_model()) if hasattr(model, "get_base_model") else model

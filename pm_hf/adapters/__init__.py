"""LoRA adapter folders: open, check, look at, merge, write; without base model, PEFT or settings."""

from pm_hf.adapters.download import adapter_folder
from pm_hf.adapters.folder import Adapter, open_adapter, replace_head, save_adapter, write_adapter
from pm_hf.adapters.inspection import describe, inspect_adapters, relate
from pm_hf.adapters.merge import MergeReport, merge_adapters

__all__ = [
    "Adapter",
    "MergeReport",
    "adapter_folder",
    "describe",
    "inspect_adapters",
    "merge_adapters",
    "open_adapter",
    "relate",
    "replace_head",
    "save_adapter",
    "write_adapter",
]

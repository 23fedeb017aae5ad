"""LoRA adapter folders: open, check, look at, merge, write; without base model, PEFT, transformers or settings."""

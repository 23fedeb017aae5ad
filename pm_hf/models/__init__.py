"""Live transformers and PEFT models: load, build, look inside, change for the length of a block."""

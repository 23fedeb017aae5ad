"""What tests share: tiny models, streams, adapters, references."""

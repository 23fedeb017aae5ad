"""A small tokenizer of words, saved as transformers saves it."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(folder, words, *added):
    """Write a tokenizer of w0 … w{words - 1} and of tokens added to it into a folder; returns the folder."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", pad_token="w1")
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    return Path(folder)

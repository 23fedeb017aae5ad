"""The kinds of stream."""

LANGUAGE = ("causal-lm", "seq2seq-lm")  # kinds of stream without a class head

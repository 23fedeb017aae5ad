"""Regular expressions of a config: at most so long, whole, and quick on the names of a model's layers."""

import json
import re
import subprocess
import sys
from functools import cache

LONGEST_PATTERN = 1000  # characters
MOST_SECONDS = 5.0  # for all names together; milliseconds are usual
LAYER_NAMES = (
    "base_model.model.model.language_model.layers.31.self_attn.qkv_proj.linear",
    "bert.encoder.layer.11.attention.self.query",
    "bert.embeddings.position_embeddings_layer_norm",
    "transformer.encoder.layers.23.mlp.dense_h_to_4h",
    "model.vision_tower.vision_model.encoder.layers.26.layer_norm1",
    "decoder.block.11.layer.2.DenseReluDense.wi_0",
    "model.layers.60.mlp.experts.127.down_proj.weight_quantizer",
)
_TRIAL = """
import json, re, sys
pattern, names = json.load(sys.stdin)
compiled = re.compile(pattern)
for name in names:
    compiled.fullmatch(name)
"""


@cache
def pattern_problem(pattern: str, names: tuple[str, ...] = LAYER_NAMES) -> str | None:
    """Why a regular expression cannot be matched with names of layers; None where it can.

    One with two quantifiers or more can take longer than the universe on a name: it is tried on `names` in a process
    that is stopped after MOST_SECONDS.
    """
    if len(pattern) > LONGEST_PATTERN:
        return f"a pattern of {len(pattern)} characters, at most {LONGEST_PATTERN} are taken; list the names instead"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{pattern!r} is no regular expression: {error or 'nested too deeply'}"
    if len(re.findall(r"[*+?{]", pattern)) < 2:
        return None
    command = [sys.executable, "-I", "-S", "-c", _TRIAL]
    task = json.dumps([pattern, list(names)])
    try:
        subprocess.run(command, input=task, text=True, timeout=MOST_SECONDS, check=False, capture_output=True)
    except subprocess.TimeoutExpired:
        return (
            f"{pattern!r} takes more than {MOST_SECONDS:g} s on names such as {names[0]}; write it without a "
            "repetition inside of a repetition, or list the names"
        )
    return None

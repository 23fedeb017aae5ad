"""What the results of a run depend on besides its settings, its rows and the versions: files that may have other
content under the same name when the run goes on.

Files of up to 64 MiB are read whole. Of a larger one the size, both ends and 64 blocks in between are: another
training of a model changes all of its tensors, and 64 GB of weights are looked at in a second. One changed bit inside
such a file is not seen.
"""

import hashlib
import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from pm_hf.adapters.layout import ADAPTER_FILES
from pm_hf.config.schema import RunConfig
from pm_hf.data.stream import TaskStream
from pm_hf.files import digest
from pm_hf.models.loading import resolve_base
from pm_hf.runs.paths import CURVATURE_FILE, POOL_FILE, STATISTICS_FILE

Inputs = dict[str, dict[str, str]]  # {setting: {file, or name of a held-out text: digest}}
WHOLE, BLOCK, BLOCKS = 64 * 2**20, 64 * 2**10, 64  # bytes of a file that is read whole, of a block; blocks of another
# files of a base model that decide what it computes, what it reads and what it writes; others may lie beside them
WEIGHTS = ("*.safetensors", "*.bin")  # the first kind that is there
BESIDE = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.index.json", "preprocessor_config.json"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.model"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.*"),
)


def run_inputs(config: RunConfig, stream: TaskStream) -> Inputs:
    """Digests of the base model (of one on the Hub its commit), of the adapter that `start_from` names, of files that
    `training` names, and of the held-out texts; {} for what is not used or cannot be seen yet."""
    named = {key: value for key, value in config.training.items() if isinstance(value, str) and os.path.isfile(value)}
    content = {
        "model.base": _base(config),
        "start_from": {} if config.start_from is None else _start(Path(config.start_from).expanduser()),
        "training": {key: file_digest(Path(name)) for key, name in named.items()},
        "stream.held_out": {text.name: text.test_fingerprint() for text in stream.held_out},
    }
    return {setting: digests for setting, digests in content.items() if digests}


def changed_inputs(now: Inputs, before: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is another one now; settings that only one of the two knows are not compared."""
    return [
        f"{setting}: {name} is not what it was"
        for setting in before
        if setting in now
        for name in sorted(now[setting].keys() | before[setting].keys())
        if now[setting].get(name) != before[setting].get(name)
    ]


def file_digest(path: Path) -> str:
    """16 hexadecimal digits of a file's content, see above."""
    size = path.stat().st_size
    if size <= WHOLE:
        return digest(path)[:16]
    content = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(BLOCKS + 2):
            file.seek((size - BLOCK) * number // (BLOCKS + 1))
            content.update(file.read(BLOCK))
    return content.hexdigest()[:16]


def _base(config: RunConfig) -> dict[str, str]:
    base = resolve_base(config.model.base)
    folder = Path(base)
    if not folder.is_dir():
        return _commit(base, config.model.revision)
    files = [path for path in folder.iterdir() if path.is_file()]
    weights = [config.model.gguf_file] if config.model.gguf_file else _first_kind(files)
    names = {path.name for path in files if any(fnmatch(path.name, pattern) for pattern in (*weights, *BESIDE))}
    return {name: file_digest(folder / name) for name in sorted(names)}


def _first_kind(files: list[Path]) -> list[str]:
    """The pattern of the weights that transformers loads."""
    return [kind for kind in WEIGHTS if any(fnmatch(path.name, kind) for path in files)][:1]


def _commit(base: str, revision: str | None) -> dict[str, str]:
    """The commit of a model in huggingface_hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    file = Path(HF_HUB_CACHE) / f"models--{base.replace('/', '--')}" / "refs" / (revision or "main")
    commit = file.read_text(encoding="utf-8").strip() if file.is_file() else revision
    return {"commit": commit} if commit else {}


def _start(adapter: Path) -> dict[str, str]:
    names = (*ADAPTER_FILES, CURVATURE_FILE, STATISTICS_FILE, POOL_FILE)
    return {name: file_digest(adapter / name) for name in names if (adapter / name).is_file()}

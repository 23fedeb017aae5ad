"""What a writer wrote that passed, and the writers that are kept in place of it: `strategy.replay_pool: false`.

Of each task so far `writers/NN` in the newest task's folder is the writer, a PEFT adapter of the base, with
assignment.json: what it was asked for, and a digest of each text that passed. On the same machine the same texts are
written again, bit for bit; a text that is not as it was then has not been compared with training rows and is left out.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pm_hf.adapters.folder import save_adapter
from pm_hf.config.schema import RunConfig
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.pool import in_turns
from pm_hf.data.writing import Assignment
from pm_hf.errors import InputError
from pm_hf.files import copy_folder, new_folder, read_record, write_json
from pm_hf.measuring.scores import Scorer
from pm_hf.runs.records import WAY_OUT
from pm_hf.training.writer import Writer, WriterAdapter, load_writer

ASSIGNMENT_FILE = "assignment.json"
ROUNDS = 5  # how often texts are asked for in place of those that were dropped
ROUNDS_WITHOUT = 20  # the same for an answer of which none has passed


@dataclass(frozen=True)
class Collected:
    """What was written. texts: (answer it was asked for, text) of those that were kept, the answers in turns; counts:
    all texts by what became of them: kept, copies, doubles, empty."""

    texts: list[tuple[str, str]]
    counts: dict[str, int]


@dataclass(frozen=True)
class KeptWriter:
    """assignment.json. ends, longest: of the writer; texts: digests of the texts that passed."""

    assignment: Assignment
    ends: tuple[int, ...]
    longest: int
    texts: tuple[str, ...]


def collect(writer: Writer, assignment: Assignment, fate: Callable[[str], str]) -> Collected:
    """As many texts as are asked for whose `fate` is "kept", the same number for each answer, as far as a few rounds of
    writing give them. A pure function of the writer, the assignment and the fates; all processes must call this."""
    form = assignment.form
    each, more = divmod(assignment.count, len(form.answers))
    missing = {answer: each + (at < more) for at, answer in enumerate(form.answers)}
    kept: dict[str, list[str]] = {answer: [] for answer in form.answers}
    counts = Counter(kept=0, copies=0, doubles=0, empty=0)
    for number in range(ROUNDS_WITHOUT):
        wanted = [answer for answer in form.answers if number < ROUNDS or not kept[answer]]
        asked = [answer for answer in wanted for _ in range(missing[answer])]
        if not asked:
            break
        said = writer.write([form.source(answer) for answer in asked], f"{assignment.key}/{number}")
        for answer, text in zip(asked, map(form.text, said), strict=True):
            became = fate(text)
            counts[became] += 1
            if became == "kept":
                kept[answer].append(text)
                missing[answer] -= 1
    return Collected(in_turns([[(answer, text) for text in texts] for answer, texts in kept.items()]), dict(counts))


def written_again(writer: Writer, kept: KeptWriter) -> list[tuple[str, str]]:
    """The texts of `collect` again, those of them that are as they were. All processes must call this."""
    passed = Counter(kept.texts)

    def fate(text: str) -> str:
        passed[_digest(text)] -= 1
        return "kept" if passed[_digest(text)] >= 0 else "copies"

    return collect(writer, kept.assignment, fate).texts


def kept_writers(folder: Path | None) -> list[Path]:
    """The folders of the writers of all tasks so far, in the order of the tasks."""
    return [] if folder is None else sorted(path for path in folder.iterdir() if path.is_dir())


def keep_writer(
    folder: Path,
    earlier: Path | None,
    adapter: WriterAdapter,
    assignment: Assignment,
    texts: Sequence[tuple[str, str]],
) -> int:
    """Write the earlier tasks' writers and this one's into `folder`, whole or not at all; bytes of the new one."""
    before = kept_writers(earlier)
    with new_folder(folder, overwrite=True) as temporary:
        for path in before:
            copy_folder(path, temporary / path.name)
        own = temporary / f"{len(before):02d}"
        save_adapter(own, adapter.config, adapter.factors, {}, {})
        digests = tuple(_digest(text) for _, text in texts)
        write_json(own / ASSIGNMENT_FILE, asdict(KeptWriter(assignment, adapter.ends, adapter.longest, digests)))
        return sum(file.stat().st_size for file in own.iterdir())


def read_kept(folder: Path) -> KeptWriter:
    """What a kept writer was asked for; InputError where its file is damaged or of another kind."""
    return read_record(folder / ASSIGNMENT_FILE, KeptWriter, WAY_OUT)


def load_kept(
    folder: Path, config: RunConfig, encoder: CausalEncoder | Seq2SeqEncoder, scorer: Scorer
) -> tuple[Writer, KeptWriter]:
    """A kept writer, ready to write, and what it was asked for."""
    kept = read_kept(folder)
    return load_writer(folder, config, encoder, kept.ends, kept.longest, scorer.device, scorer.autocast), kept


def check_kept(folder: Path) -> None:
    """InputError where the writers of a released adapter cannot be read."""
    if not (folders := kept_writers(folder)):
        raise InputError(f"{folder} holds no writer")
    for path in folders:
        read_kept(path)


def _digest(text: str) -> str:
    """16 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Checkpoints of a task's training that are whole: synced, then marked, and only then is an older one removed.

Trainer writes the files of a checkpoint one after the other (the adapter, the optimizer, the random state, and
trainer_state.json at the end), waits for no disk, and removes the one before it at once. Beside them a checkpoint keeps
what its steps add to step.json (the losses, a bounded log of them, and the factors) and the size and digest of every
file, so that nothing goes on from one that is damaged. That costs one reading of it: a second for 1 to 2 GB.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from pm_hf.distributed import gather, log_line, on_all_processes, on_main_process
from pm_hf.errors import InputError
from pm_hf.files import (
    FileMark,
    Number,
    WriteError,
    damaged_file,
    errno_of,
    file_marks,
    free_bytes,
    read_json,
    read_record,
    set_aside,
    sync,
    sync_folder,
    write_json,
)
from pm_hf.training.trainer import BeforeTrainer

WHOLE_FILE = "whole.json"  # the last file of a checkpoint, written when the others are on the disk
TRAINER_STATE_FILE = "trainer_state.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
ASIDE_NAME = re.compile(r"damaged-checkpoint-(\d+)(-\d+)?")  # one that nothing goes on from
LOADED = (".json", ".pt", ".pth", ".bin", ".safetensors")  # files of a checkpoint that a training may read
TORCH_WRITER = re.compile("inline_container|PytorchStreamWriter|iostream")  # in torch.save's errors, without a reason
LOSSES_ON_DEVICE = 100  # how many are kept there before they are added up
MOST_POINTS = 256  # points of one training's LossLog


@dataclass
class Progress:
    """What the steps up to a checkpoint add to step.json: the losses' sum in each process, the factors of all, and the
    points of the main process's LossLog."""

    losses: list[float] = field(default_factory=list)
    factors: dict[str, int] = field(default_factory=dict)
    log: list[list[Number]] = field(default_factory=list)


@dataclass
class Whole(Progress):
    """whole.json. files: {name: size and SHA-256} of the others but trainer_state.json; state: digest of that, wherever
    the folder lies; digest: of all this. An older version wrote none of the three."""

    files: dict[str, FileMark] = field(default_factory=dict)
    state: str | None = None
    digest: str | None = None


@dataclass
class SavedState:
    """What trainer_state.json must hold for Trainer to go on; see TrainerState."""

    global_step: int
    max_steps: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_model_checkpoint: str | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)


class _TrainingBegins(TrainerCallback):
    """Calls `begin` where a training begins; a retry, `auto_find_batch_size`'s too, is one."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._begin()


class AtomicCheckpoints(BeforeTrainer):
    """The only change to PMTrainer is in how a checkpoint is written: whole or not at all.

    It counts once `whole.json` is in it, which is written when every process has written its part and all is synced;
    `save_total_limit` is kept after that. Raises WriteError when it could not be written: the half of it is removed,
    the one before it stays.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._before = Progress()
        self._losses = list[Tensor]()
        self._drawn_at = list[tuple[int, float]]()  # (step, factor) of each of `_losses`
        self._begin_counting()
        self.add_callback(_TrainingBegins(self._begin_counting))

    def continue_from(self, checkpoint: str | None) -> None:
        """Count on from what `checkpoint` says; call it before `train(resume_from_checkpoint=checkpoint)`."""
        self._before = Progress() if checkpoint is None else _read_whole(Path(checkpoint))
        self._begin_counting()

    def _begin_counting(self) -> None:
        """Count on from `_before`; what was counted since is forgotten."""
        self._losses.clear()
        self._drawn_at.clear()
        self._log = LossLog(self._before.log)
        losses, index = self._before.losses, self.args.process_index
        same = len(losses) == self.args.world_size
        self._loss_sum = losses[index] if same else sum(losses) / max(1, len(losses))

    def progress(self) -> Progress:
        """Losses and factors of all steps so far, those before a checkpoint that was continued included."""
        of_processes = gather((self._summed(), self.perturbation_counts))
        drawn = sum((counts for _, counts in of_processes), Counter[float]())
        factors = Counter(self._before.factors) + Counter({f"{factor:g}": drawn[factor] for factor in sorted(drawn)})
        return Progress([loss for loss, _ in of_processes], dict(sorted(factors.items())), self._log.points)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The step; its loss is added up."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach())
        self._drawn_at.append((self.state.global_step + 1, self._drawn.since_log[-1]))
        if len(self._losses) >= LOSSES_ON_DEVICE:
            self._summed()
        return loss

    def _summed(self) -> float:
        losses = torch.stack(self._losses).tolist() if self._losses else []
        for loss, (step, factor) in zip(losses, self._drawn_at, strict=True):
            self._loss_sum += loss  # one after the other: a continued training gets the same sum
            self._log.add(step, loss, factor)
        self._losses.clear()
        self._drawn_at.clear()
        return self._loss_sum

    def _save_rng_state(self, output_dir: str) -> None:
        """Trainer's, in all processes before the state file is written that makes the checkpoint a complete one."""
        super()._save_rng_state(output_dir)
        gather(None)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit, error = self.args.save_total_limit, None, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as caught:
            error = _write_error(path, caught)
        finally:
            self.args.save_total_limit = limit
        on_all_processes(lambda: _raise(error))
        progress = self.progress()
        on_main_process(lambda: _seal(path, progress))
        on_main_process(lambda: _rotate(path.parent, limit, self.state.best_model_checkpoint))


def last_checkpoint(folder: Path) -> str | None:
    """Newest whole checkpoint of a task, None where there is none to go on from.

    A newer one that was half written when its process was killed is removed. One that is damaged (a file is missing,
    or has other bytes than were written) is set aside as `damaged-checkpoint-…`, with one line on stderr that says so
    and what the training goes on from. The best checkpoint that it names is looked for beside it: the folder may have
    been moved. Raises InputError, and changes nothing, where a file cannot be read.
    """
    problems: list[tuple[Path, str | None]] = []
    whole = None
    for path in reversed(_checkpoints(folder)):
        problem = _damage(path)
        if problem is None:
            whole = path
            break
        half = not path.is_symlink() and WHOLE_FILE not in os.listdir(path)
        problems.append((path, None if half else problem))
    for path, problem in problems:
        if problem is None:
            shutil.rmtree(path)
            continue
        set_aside(path, f"damaged-{path.name}", "-")
        log_line(f"{problem}; the checkpoint is not continued from")
    if any(problem for _, problem in problems):
        log_line(f"the training goes on from {whole}" if whole else f"{folder.parent.name}: the task begins anew")
    if whole is not None:
        _find_best_beside(whole)
    return None if whole is None else str(whole)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a task, and the folder unless something else is in it."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if CHECKPOINT_NAME.fullmatch(path.name) or ASIDE_NAME.fullmatch(path.name):
            _remove(path)
    if not any(folder.iterdir()):
        folder.rmdir()


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be continued from; InputError where the system does not let it be read."""
    try:
        whole = _read_whole(path)
        state = read_record(path / TRAINER_STATE_FILE, SavedState, "it was changed by hand or damaged")
        if whole.digest is None:
            return _older_damage(path, whole, state)
        names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in LOADED}
        strange = sorted(names - whole.files.keys() - {WHOLE_FILE, TRAINER_STATE_FILE})
        if strange:
            return f"{path / strange[0]} was not written with the checkpoint"
        if whole.digest != _own_digest(read_json(path / WHOLE_FILE)):
            return f"{path / WHOLE_FILE} holds other values than were written"
        if whole.state != _state_digest(path):
            return f"{path / TRAINER_STATE_FILE} holds other values than were written"
        return damaged_file(path, whole.files) or _damage_of_best(path, state)  # last: they read all
    except InputError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        return str(error)
    except OSError as error:
        raise InputError(
            f"checkpoint {path} cannot be read ({error.strerror}: {error.filename}); make it readable, or move it away"
        ) from error


def _damage_of_best(path: Path, state: SavedState) -> str | None:
    """Why the best checkpoint that one names cannot be loaded at the end of the training."""
    if state.best_model_checkpoint is None or (name := Path(state.best_model_checkpoint).name) == path.name:
        return None
    damage = _damage(path.with_name(name)) if path.with_name(name).is_dir() else f"{path.with_name(name)} is not there"
    return damage and f"{damage}; it is the best checkpoint of {path}"


def _older_damage(path: Path, whole: Whole, state: SavedState) -> str | None:
    """The same for a checkpoint without digests, as far as it shows."""
    if not whole.losses:
        return f"{path / WHOLE_FILE}: losses are missing"
    file, content = path / TRAINER_STATE_FILE, read_json(path / TRAINER_STATE_FILE)
    if unknown := content.keys() - {part.name for part in fields(TrainerState)}:
        return f"{file}: {min(unknown)} is no field of a TrainerState"
    step = int(path.name.rpartition("-")[2])
    return None if state.global_step == step else f"{file}: expected global_step {step}, found {state.global_step}"


def _read_whole(path: Path) -> Whole:
    return read_record(path / WHOLE_FILE, Whole, "it was changed by hand or damaged")


def _content_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _own_digest(content: Mapping[str, Any]) -> str:
    """What whole.json says of itself."""
    return _content_digest({key: value for key, value in content.items() if key != "digest"})


def _state_digest(path: Path) -> str:
    """Digest of what trainer_state.json says, of the best checkpoint's path its name alone."""
    content = read_json(path / TRAINER_STATE_FILE)
    best = content.get("best_model_checkpoint")
    return _content_digest(content | {"best_model_checkpoint": None if best is None else Path(best).name})


def _find_best_beside(path: Path) -> None:
    """Name the best checkpoint where it lies now."""
    content = read_json(path / TRAINER_STATE_FILE)
    best = content.get("best_model_checkpoint")
    if best is not None and Path(best).parent != path.parent:
        moved = {"best_model_checkpoint": str(path.parent / Path(best).name)}
        write_json(path / TRAINER_STATE_FILE, content | moved)


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder in the order of their steps; a link to one counts."""
    paths = [path for path in folder.glob("checkpoint-*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(
        (path for path in paths if path.is_dir() or path.is_symlink()),
        key=lambda path: int(path.name.partition("-")[2]),
    )


def _seal(path: Path, progress: Progress) -> None:
    sync_folder(path)
    for above in list(path.parents)[:2]:
        sync(above)  # their lists of names
    names = sorted(entry.name for entry in path.iterdir() if entry.name != TRAINER_STATE_FILE)
    content = {**asdict(progress), "files": file_marks(path, names), "state": _state_digest(path)}
    write_json(path / WHOLE_FILE, content | {"digest": _own_digest(content)})


def _rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints above `limit`, never the newest or the best, as Trainer does."""
    paths = _checkpoints(folder)
    needed = {paths[-1], Path(best or paths[-1])}
    excess = 0 if not limit else len(paths) - max(limit, len(needed))
    for path in [path for path in paths if path not in needed][: max(0, excess)]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, of a link the link alone; from now on it does not count, wherever this stops."""
    if path.is_symlink():
        path.unlink()
        return
    (path / WHOLE_FILE).unlink(missing_ok=True)
    shutil.rmtree(path)


def _write_error(path: Path, error: Exception) -> Exception:
    """WriteError for an error of writing, after what was written is removed; any other error as it is."""
    of_torch = isinstance(error, RuntimeError)
    if of_torch and not TORCH_WRITER.search(str(error)):
        return error
    free = free_bytes(path)
    shutil.rmtree(path, ignore_errors=True)
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    reason = "torch.save failed, as it does when the disk is full" if of_torch else reason
    write_error = WriteError(path, f"{reason} ({free / 1e6:.1f} MB free)", errno_of(error))
    write_error.__cause__ = error
    return write_error


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


class LossLog:
    """[step, loss, factor] of steps 1, 1 + k, 1 + 2k, …; k doubles when there are more than MOST_POINTS points.

    step counts optimizer steps from 1; loss is the sum over the micro-steps of the step, as Trainer divides it; factor
    the mean of the factors they drew. Both are those of one process.
    """

    def __init__(self, points: Iterable[Iterable[float]] = ()) -> None:
        self.points = [list(point) for point in points]
        self._stride = int(self.points[1][0] - self.points[0][0]) if len(self.points) > 1 else 1
        self._micro = 1  # micro-steps in the newest point

    def add(self, step: int, loss: float, factor: float) -> None:
        """Count in one micro-step; steps come in their order."""
        if (step - 1) % self._stride:
            return
        if self.points and step == self.points[-1][0]:
            newest = self.points[-1]
            self._micro += 1
            newest[1] += loss
            newest[2] += (factor - newest[2]) / self._micro
            return
        self._micro = 1
        self.points.append([step, loss, factor])
        if len(self.points) > MOST_POINTS:
            self._stride *= 2
            self.points = [point for point in self.points if not (point[0] - 1) % self._stride]

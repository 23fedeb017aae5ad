"""Writes that are whole or absent: one file or one folder at a time, synced before it takes its name.

A write goes into a folder `.<name>.tmp-<place>-<pid>` beside its target; the place stands for the machine, or the
container, whose process number it is. What a killed process leaves is removed by the next write to the same target.
"""

import ctypes
import errno
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pm_hf.errors import InputError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]


LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-((?P<place>m[0-9a-f]{8})-)?(?P<pid>\d+)(-\d+)?")


ABANDONED = 24 * 3600  # seconds without a change after which what another machine left counts as dead


_number, _open = count(), set[Path]()  # temporary folders of this process: how many there were, which are in use


OS_ERROR = re.compile(r"\(os error (\d+)\)")  # in the text of an error of safetensors, which has no errno


LOCK = ".lock"


LONGEST_NAME = 200  # bytes; file systems take 255, and the temporary name is longer
LONGEST_COMPONENT = 255  # bytes of one name in a path, on any usual file system


LONGEST_VALUE, MOST_NAMED = 80, 8  # characters shown of a wrong value, fields named that are missing


LARGEST_NUMBER = 10**300  # of JSON content: arithmetic with floats has room for it


SAME_BLOCK = 2**20  # bytes that are compared at once


Record = TypeVar("Record")


if TYPE_CHECKING:
    Number = float
else:
    Number = int | float  # in a record: as it stands in the file; `float` alone turns 3 into 3.0


FileMark = tuple[int, str]  # size in bytes and SHA-256 of a file


AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux <fcntl.h> and <linux/fs.h>


class WriteError(OSError):
    """A write that failed. The message names the target, the reason and what stands there now; errno is kept."""

    def __init__(self, path: Path, reason: str, errno: int | None) -> None:
        outcome = "what was there before is untouched" if path.exists() else "nothing was left behind"
        super().__init__(f"{path} could not be written: {reason}; {outcome}")
        self.reason, self.errno = reason, errno


def path_problem(name: str | os.PathLike) -> str | None:
    """Why a text can be no path: a NUL, half a character, a name that is too long, the home of nobody; else None."""
    text = os.fspath(name)
    try:
        longest = max(len(part.encode()) for part in text.split("/"))
    except UnicodeEncodeError:
        return f"{text!r} has half a character"
    if "\0" in text:
        return f"{text!r} has a NUL character"
    if longest > LONGEST_COMPONENT:
        return f"a name of {longest} bytes, a file system takes {LONGEST_COMPONENT}: {text[:40]}…"
    try:
        Path(text).expanduser()
    except RuntimeError:
        return f"{text!r}: there is no user {text[1:].partition('/')[0]!r}; give the folder's whole path"
    return None


def expand(name: str | os.PathLike, what: str) -> Path:
    """A path with ~ expanded; InputError with `what` for a text that can be none."""
    if problem := path_problem(name):
        raise InputError(f"{what}: {problem}")
    return Path(name).expanduser()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically and synced; NaN is written as null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and synced; WriteError when that fails."""
    with _new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file {name: tensor} atomically and synced, dtypes and shapes as they are.

    Raises WriteError, an OSError with the bytes needed and free, when the disk is full or the file may not be written:
    safetensors itself raises its own SafetensorError there.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with _new_file(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            if (code := errno_of(error)) is None:
                raise
            needed = sum(tensor.nbytes for tensor in contiguous.values())
            sizes = f"{_size(needed)} needed, {_size(free_bytes(temporary))} free"
            raise OSError(code, f"{os.strerror(code)} ({sizes})") from error


def errno_of(error: BaseException) -> int | None:
    """The system's number of an error of writing: that of an OSError, or the one that safetensors' text names."""
    named = OS_ERROR.search(str(error))
    return int(named[1]) if named else getattr(error, "errno", None)


def free_bytes(path: Path) -> int:
    """Free bytes where `path` is, or is to be written: in its nearest existing folder."""
    return shutil.disk_usage(_nearest_folder(path)).free


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def free_space_problem(path: Path, needed: int) -> str | None:
    """Why `needed` bytes do not fit where `path` is to be written (its nearest existing parent); None if they do."""
    path = path.resolve()
    folder, free = _nearest_folder(path), free_bytes(path)
    if free >= needed:
        return None
    return f"{path} needs {_size(needed)}, {folder} has {_size(free)} free; free some space or choose another folder"


def read_json(path: Path) -> Any:
    """Read a JSON file; InputError when it is missing, cannot be read (its cause is the OSError) or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)
    except FileNotFoundError as error:
        raise InputError(f"{path} cannot be read as JSON: it does not exist") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; make it readable") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key in content if sum(name == key for name, _ in pairs) > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return content


def read_record(path: Path, kind: type[Record], way_out: str) -> Record:
    """Read a JSON file that a run wrote, as the dataclass that says what stands in it; see `as_record`."""
    return as_record(read_json(path), kind, str(path), way_out)


def read_checked(path: Path, kind: type, way_out: str) -> Any:
    """The content of such a file as it stands, after `as_record` has taken it as `kind`."""
    content = read_json(path)
    as_record(content, kind, str(path), way_out)
    return content


def as_record(content: Any, kind: type[Record], subject: str, way_out: str) -> Record:
    """JSON content as a dataclass.

    Types are taken as they stand ("1" is no number, 1.0 no count), numbers are finite, keys that `kind` does not have
    are left alone, and those with a default may be missing: another version may have written the file. Besides, a
    method `problem` of `kind` says what types do not tell. Raises InputError with the subject, the first field that is
    not as expected, what was expected and found there, and the way out.
    """
    from pydantic import ValidationError

    try:
        # validated as JSON, where a list may become a tuple and a whole number a float, and nothing else is converted
        record: Record = _schema(cast(Any, kind)).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise InputError(f"{subject}: {_first_problem(error)}; {way_out}") from error
    problem = _not_finite(content, "") or (record.problem() if hasattr(record, "problem") else None)
    if problem:
        raise InputError(f"{subject}: {problem}; {way_out}")
    return record


@functools.cache
def _schema(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _first_problem(error: Any) -> str:
    errors = error.errors(include_url=False, include_context=False)
    if missing := [".".join(map(str, part["loc"])) for part in errors if part["type"] == "missing"]:
        return f"it lacks {', '.join(missing[:MOST_NAMED])}"
    first = errors[0]
    field = ".".join(map(str, first["loc"])) or "content"
    expected = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    shown = json.dumps(first["input"], ensure_ascii=False)
    return (
        f"{field}: expected {expected}, found {shown if len(shown) <= LONGEST_VALUE else shown[:LONGEST_VALUE] + ' …'}"
    )


def _not_finite(value: Any, field: str) -> str | None:
    """The first number of JSON content that is NaN or infinite, or that no float can hold."""
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        return f"{field}: expected a number of at most 300 digits, found one of more"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{field}: expected a finite number, found {value}"
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    below = (_not_finite(item, f"{field}.{key}" if field else str(key)) for key, item in items)
    return next((problem for problem in below if problem), None)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; true and false are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as `sha256sum` prints it; 1 to 2 GB a second where the processor has instructions for
    it, a third of that elsewhere."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_marks(folder: Path, names: Iterable[str]) -> dict[str, FileMark]:
    """{name: (size in bytes, SHA-256)} of the files in `folder` that `names` name; of a folder every file in it."""
    marks: dict[str, FileMark] = {}
    for name in names:
        path = folder / name
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        marks |= {
            file.relative_to(folder).as_posix(): (file.stat().st_size, digest(file)) for file in files if file.is_file()
        }
    return marks


def damaged_file(folder: Path, marks: Mapping[str, FileMark]) -> str | None:
    """What is wrong with the first file that is not as it was marked; None where all are."""
    for name, (size, _) in marks.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is not there"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, it was written with {size}"
    changed = next((name for name, (_, known) in marks.items() if digest(folder / name) != known), None)
    return None if changed is None else f"{folder / changed} holds other bytes than were written"


def output_problems(path: Path, *, overwrite: bool, allowed: Collection[str] | None = None) -> list[str]:
    """Why a folder cannot be written to `path`; [] where it can.

    allowed: the names that a folder to be replaced may hold; None: any.
    """
    try:
        if path.exists() and not overwrite:
            return [f"output {path} exists; choose another folder, or overwrite=True (--overwrite) to replace it"]
        dangling = next((place for place in path.absolute().parents if place.is_symlink() and not place.exists()), None)
        if dangling is not None:
            raise FileNotFoundError(f"{dangling} is a link to what is not there")
        path = path.resolve()
        parent = next(folder for folder in path.parents if folder.exists())
        names = [entry.name for entry in path.iterdir()] if allowed and path.exists() else []
        strange = sorted(name for name in names if _target_name(name) not in (allowed or ()))
    except (OSError, ValueError, RuntimeError) as error:  # a file, a loop of links, a name that cannot be
        return [_unwritable(path, error)]
    if not parent.is_dir() or not os.access(parent, os.W_OK) or len(os.fsencode(path.name)) > LONGEST_NAME:
        return [
            f"output {path} cannot be written: expected a name of at most {LONGEST_NAME} bytes in a folder that "
            f"may be written to, found {parent}; choose another folder"
        ]
    return [f"output {path} is not an adapter folder alone, it holds {strange[:3]}; choose another"] if strange else []


def _target_name(name: str) -> str:
    """What a file was to be called that a killed write left behind; else the name itself."""
    leftover = LEFTOVER.fullmatch(name)
    return leftover["name"] if leftover else name


@contextmanager
def new_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its name when the block ends without an error.

    The old folder, if any, keeps its content until then. On Linux the two change places in one step, so that a process
    killed at any moment leaves the old or the new folder whole under its name; elsewhere there are two renames, and a
    kill between them leaves the name free until the next write puts the old folder back. After an error the new folder
    is removed and nothing changed: InputError where `path` cannot be an output, WriteError where a write failed.
    """
    try:
        path = path.resolve()
        if path.exists() and not path.is_dir():
            raise InputError(f"output {path} is a file, expected a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
    except OSError as error:
        raise InputError(_unwritable(path, error)) from error
    if problems := output_problems(path, overwrite=overwrite):
        raise InputError("; ".join(problems))
    with _beside(path) as temporary:
        yield temporary
        sync_folder(temporary)
        _swap(temporary, path) if overwrite else _claim(temporary, path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Windows opens no folder, and syncs a file only through a handle that may write.
    """
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless they are there, and wait until their names are on the disk."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new or [path]:
        sync(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder and everything in it is on the disk."""
    for entry in (*folder.rglob("*"), folder):
        sync(entry)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an existing folder for this process; InputError when another one holds it, or its lock cannot be one.

    The lock is the kernel's: it goes with the process, however that ends. Systems without flock are not protected.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    with os.fdopen(_open_lock(path), "r+", encoding="utf-8", errors="replace") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino != os.fstat(handle.fileno()).st_ino:
                raise BlockingIOError(path)  # its holder has just removed it, and another made a new one
        except (BlockingIOError, PermissionError, FileNotFoundError) as error:
            holder = handle.read(200).strip() or "unknown"
            raise InputError(f"{folder} is in use by process {holder}; wait for it or choose another folder") from error
        except OSError as error:
            raise InputError(
                f"{folder} cannot be locked against a second run: its file system has no flock ({error.strerror}); "
                "choose a folder on another file system, or mount this one with locks"
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _open_lock(path: Path) -> int:
    """A descriptor of the lock's file, made if need be; InputError where something else has its name."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        lock = None
    if lock is not None and stat.S_ISREG(os.fstat(lock).st_mode):
        return lock
    if lock is not None:
        os.close(lock)
    raise InputError(f"{path} is a link or no file: expected the lock of a run; remove it")


def copy_folder(source: Path, target: Path, kept: Iterable[str] = ()) -> None:
    """Replace `target` by a copy of `source`, whole or not at all. kept: names in `target` that stay in it."""
    with new_folder(target, overwrite=True) as temporary:
        for name in kept:
            _copy(target / name, temporary / name)
        _copy(source, temporary)


def _copy(source: Path, target: Path) -> None:
    """A copy of a file, or of a folder and all that is in it, over what stands there; links are followed."""
    if not source.is_dir():
        shutil.copy2(source, target)
        return
    for folder, _, names in os.walk(source, onerror=_raise, followlinks=True):
        inside = target / Path(folder).relative_to(source)
        inside.mkdir(exist_ok=True)
        for name in names:
            shutil.copy2(Path(folder, name), inside / name)


def remove_leftovers(folder: Path, name: str | None = None, *, held: bool = False) -> None:
    """Remove what dead processes left beside the target `name` in `folder`, or beside every target.

    What a living process of this machine writes stays, and what another machine or container wrote within a day.
    held: nobody else writes in this folder, as this process holds the run's lock. An old folder whose target is gone
    was about to be replaced: it gets its name back.
    """
    for path in folder.iterdir():
        leftover = LEFTOVER.fullmatch(path.name)
        if not leftover or name not in (None, leftover["name"]) or path in _open:
            continue
        if not held and _at_work(path, leftover):
            continue
        target = folder / leftover["name"]
        if leftover["kind"] == "old" and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _at_work(path: Path, leftover: re.Match) -> bool:
    """Whether the process that made a temporary folder may still write in it."""
    if leftover["place"] in (None, _place()):
        return _alive(int(leftover["pid"]))
    try:
        return time.time() - max(entry.lstat().st_mtime for entry in (path, *path.rglob("*"))) < ABANDONED
    except FileNotFoundError:  # it has just been moved to its place
        return True


@functools.cache
def _place() -> str:
    """Where this process's number is its own: a machine, or a container of one."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        namespace = ""
    return "m" + hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def set_aside(path: Path, name: str, between: str) -> None:
    """Give a file or folder the name, or the first of `name` + between + 1, 2, … that is free beside it."""
    names = (f"{name}{between}{number}" if number else name for number in count())
    os.replace(path, next(aside for aside in map(path.with_name, names) if not aside.exists()))


def same_files(left: Path, right: Path) -> bool:
    """Whether the folder `right` holds every file of `left`, byte for byte; what else it holds does not matter."""
    names = [path.name for path in left.iterdir()]
    return all(_same_file(left / name, right / name) for name in names)


def _same_file(left: Path, right: Path) -> bool:
    if not right.is_file() or left.stat().st_size != right.stat().st_size:
        return False
    with open(left, "rb") as ours, open(right, "rb") as theirs:
        while (block := ours.read(SAME_BLOCK)) == theirs.read(SAME_BLOCK):
            if not block:
                return True
    return False


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to that takes the name `path` when the block ends without an error.

    Inside a folder that `new_folder` is making it is the name itself: that folder is synced as a whole.
    """
    making = LEFTOVER.fullmatch(path.parent.name)
    if making and making["place"] == _place() and int(making["pid"]) == os.getpid():
        yield path
        return
    remove_leftovers(path.parent, path.name)
    with _beside(path) as folder:
        yield folder / path.name
        sync(folder / path.name)
        os.replace(folder / path.name, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; it is gone afterwards, and an OSError in the block becomes a WriteError."""
    temporary = path.with_name(f".{path.name}.tmp-{_place()}-{os.getpid()}-{next(_number)}")
    _open.add(temporary)
    try:
        temporary.mkdir()
        yield temporary
    except OSError as error:
        reason = getattr(error, "reason", None) or _reason(error)
        raise WriteError(path, reason, error.errno) from error
    else:
        sync(path.parent)  # what was replaced goes only after this
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _open.discard(temporary)


def _claim(new: Path, path: Path) -> None:
    """Give `new` the name `path`, which nothing else may have taken meanwhile."""
    try:
        os.rename(new, path)
    except OSError as error:
        if not path.exists():
            raise
        raise InputError(f"output {path} exists now, another process wrote it; choose another folder") from error


def _swap(new: Path, path: Path) -> None:
    """Give `new` the name `path`; an old folder of that name ends up under the name `new`, or is removed."""
    if _exchange(new, path):
        return
    old = path.with_name(f".{path.name}.old-{_place()}-{os.getpid()}")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(left: Path, right: Path) -> bool:
    """Let two folders change names in one step; False, and nothing done, where kernel or file system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc ≥ 2.28
    names = os.fsencode(left), os.fsencode(right)
    return renameat2 is not None and renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0


def _alive(pid: int) -> bool:
    """Whether another process of this number runs."""
    import psutil

    try:
        return pid != os.getpid() and psutil.pid_exists(pid)
    except OverflowError:  # no system has so many
        return False


def _unwritable(path: Path, error: Exception) -> str:
    return f"output {path} cannot be written: {error}; choose another folder"


def _reason(error: OSError) -> str:
    name = f": {error.filename}" if error.filename is not None else ""
    return f"{error.strerror}{name}" if error.strerror else str(error)


def _raise(error: OSError) -> None:
    raise error


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and value != value:  # NaN
        return None
    return value

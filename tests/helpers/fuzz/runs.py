"""Files of a run: damaged ones are refused in one line, or what comes of them is what comes of the run undamaged.

A finished run and one that was stopped between two checkpoints are learned once a process; a case is a copy with one or
two damages and a command. Values of the same kind (another score) cannot be told from true ones, nor can keys that an
older version did not write: where these alone have changed, a command only has to end as it should.
"""

import atexit
import functools
import hashlib
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

import pm_hf.reports.canvas
import pm_hf.runs.learner
import pm_hf.runs.merge_line
from helpers import changed
from helpers.fuzz import REFUSED, RIGHT, check
from helpers.kills import stops_after_checkpoint
from helpers.streams import FEW, settings, write_base, write_data, write_yaml
from pm_hf.cli import BAD_INPUT, DONE, FAILED, main
from pm_hf.training.checkpoints import last_checkpoint

FIRST, SECOND, NEWEST, OLDER = "task-00-first", "task-01-second", "checkpoint-2", "checkpoint-1"
CHANGES: dict[str, Any] = {**FEW, "groups": 2, "method": "best", "training__num_train_epochs": 2}
CHANGES |= {"training__save_strategy": "steps", "training__save_steps": 1, "training__save_total_limit": 2}
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "labels.json")
MERGED = (*ADAPTER, "merge_report.json")
SUMS = ("curvature.safetensors", "head_statistics.safetensors")
TASK = ("step.json", *(f"adapter/{n}" for n in ADAPTER), *(f"merged/{n}" for n in MERGED), *SUMS)
RECORDS = ("report.json", "config.yaml", f"{FIRST}/step.json", f"{SECOND}/step.json", "coefficient.json")
RELEASED = tuple(f"{folder}/{n}" for folder in (f"{FIRST}/merged", f"{SECOND}/merged", "merged") for n in MERGED)
RELEASED += tuple(f"{folder}/adapter/{n}" for folder in (FIRST, SECOND) for n in ADAPTER)
CHECKPOINT = ("whole.json", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
CHECKPOINT += ("task/adapter_model.safetensors", "task/adapter_config.json", "training_args.bin")
KEPT = tuple(f"{SECOND}/checkpoints/{point}/{name}" for point in (NEWEST, OLDER) for name in CHECKPOINT)
# {command: (the run that it is given, files that it reads)}
COMMANDS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "report": ("finished", RECORDS),
    "push": ("finished", (*RECORDS[:4], *RECORDS[:4], *RELEASED)),
    "inspect": ("finished", (*RECORDS, f"{FIRST}/merged/labels.json", f"{SECOND}/adapter/adapter_config.json")),
    "evaluate": ("finished", tuple(f"merged/{name}" for name in ADAPTER)),
    "train": ("finished", (*RECORDS, *(f"{task}/{n}" for task in (FIRST, SECOND) for n in TASK), *RELEASED)),
    "begin": (None, ()),
    "go on": ("stopped", (*RECORDS[:3], *(f"{FIRST}/{name}" for name in TASK), f"{SECOND}/rows.json", *KEPT, *KEPT)),
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, -1, "\x1b[2J", "nan", "a\nb"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WHOLE = [b"", b"[]", b"{}", b"null", b"3", b'"x"', b"[" * 3000, b"\xff\xfe", b"\0" * 50, b"1" * 5000, b"!!python/x []"]
WHOLE += [b'{"a":' * 600, b"a: [", b"PK\x03\x04", b'{"task": "\\ud800"}']
PLACES = st.integers(0, 2**20)
VALUES = st.tuples(st.just("value"), PLACES, JSON)
KEYS = st.tuples(st.just("without"), PLACES, st.none())
BYTES = st.tuples(st.sampled_from(["flip", "cut", "put"]), PLACES, st.binary(min_size=1, max_size=2))
WHOLES = st.tuples(st.just("whole"), st.just(0), st.sampled_from(WHOLE))
OTHERS = st.tuples(st.sampled_from(["gone", "zeros", "folder", "link"]), st.just(0), st.none())


def _cases(command: str) -> st.SearchStrategy:
    damages = st.one_of(VALUES, VALUES, KEYS, BYTES, BYTES, WHOLES, OTHERS)
    damage = st.tuples(st.sampled_from(COMMANDS[command][1]), damages)
    return st.fixed_dictionaries({"command": st.just(command), "damages": st.lists(damage, min_size=1, max_size=2)})


CASES = st.sampled_from(
    [name for name, (_, files) in COMMANDS.items() if files] + ["go on", "go on", "report"]
).flatmap(_cases)


class _BeginsError(Exception):
    """A training would begin now."""


# ---- the runs


@functools.cache
def prepared() -> Path:
    """A folder with `finished`, `stopped`, what they were made of, and what each command says of them."""
    home = Path(tempfile.mkdtemp(prefix="fuzz-runs-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "base").mkdir()
    base, data = write_base(home / "base"), write_data(home / "data", 8)
    quiet = io.StringIO()
    with redirect_stdout(quiet), redirect_stderr(quiet), _quick():
        with stops_after_checkpoint(SECOND, 2):
            pm_hf.runs.learner.learn(settings(base, data, home / "stopped", **CHANGES))
        shutil.copytree(home / "stopped", home / "finished")
        pm_hf.runs.learner.learn(settings(base, data, home / "finished", **CHANGES))
        main(["inspect", "--coefficient", str(home / "finished")])
    return home


@functools.cache
def undamaged(command: str) -> Any:
    """What a command gives of the run as it was written."""
    with tempfile.TemporaryDirectory() as name:
        code, _, found = _outcome(command, _copy(command, Path(name)))
    assert code in (DONE, None), f"{command} of a whole run: {code}"
    return found


def _copy(command: str, folder: Path) -> Path:
    if COMMANDS[command][0] is None:
        return folder / "run"
    return shutil.copytree(
        prepared() / str(COMMANDS[command][0]), folder / "run", ignore=shutil.ignore_patterns("plots", "report.html")
    )


@contextmanager
def _quick() -> Iterator[None]:
    """Without PNG of charts, with few points of a merge line."""
    with ExitStack() as held:
        held.enter_context(mock.patch.object(pm_hf.reports.canvas, "_write_png"))
        held.enter_context(mock.patch.object(pm_hf.runs.merge_line, "COEFFICIENT_GRID", (0.0, 0.5, 1.0)))
        yield


# ---- a case


def judge(case: Mapping, folder: Path) -> str:
    """RIGHT or REFUSED; SilentError where what comes out differs although the damage can be seen."""
    command, wanted = case["command"], undamaged(case["command"])
    run = _copy(command, folder)
    whole, broken = {}, set()
    for name, damage in case["damages"]:
        whole.setdefault(name, (run / name).read_bytes() if (run / name).is_file() else b"")
        broken |= {name} if _damage(run / name, *damage) else set()
    if any(_may_change(command, run / name) for name in broken):
        broken = set()  # what comes out may be another, whatever the rest does
    others = [name for name, content in whole.items() if not _is(run / name, content)]
    code, said, found = _outcome(command, run)
    lines = [line for line in said.splitlines() if line.startswith("pm-hf: ")]
    check("Traceback" not in said and "\x1b" not in said, said)
    left_out = command == "evaluate" and "is left out" in said
    # a report is written only, so what is in its way is found then
    in_the_way = command in ("train", "go on") and "report.json could not be written: Is a directory" in said
    if code == FAILED and (left_out or in_the_way):
        return REFUSED
    if code not in (DONE, None):
        check(code == BAD_INPUT and len(lines) == 1, "code", code, "and said:", said)
        check(command in ("train", "go on") or len(said.splitlines()) == 1, "not one line:", said)
        return REFUSED
    anew = code is None and not (run / FIRST / "step.json").is_file()  # the first task is not finished, then
    if code is None:  # what a training begins with: that of the second task, or of the first
        wanted = undamaged("begin" if anew else "go on")
    check(found == wanted or not broken & set(others), others, "of", case, "gave", *_first_difference(found, wanted))
    marked = [name for name in others if _is_marked(command, name) and not anew]
    check(not marked, marked, "changed, and nobody says so")
    return RIGHT


def _is(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _may_change(command: str, path: Path) -> bool:
    """Whether a command has no way to see that a file was damaged, or takes one that is not there."""
    if command == "report" and path.name == "config.yaml":  # shown as it stands
        return True
    if command in ("report", "train") and path.name == "step.json":  # the task is not finished, then
        return not path.exists()
    if command == "evaluate" and path.suffix == ".safetensors" and path.is_file():  # an adapter's numbers are its own
        try:
            return bool(load_file(path))
        except SafetensorError:
            return False
    return False


def _first_difference(found: Any, wanted: Any) -> tuple[str, str, str]:
    left, right = str(found), str(wanted)
    at = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    at = max(0, at - 100)
    return left[at : at + 300], "not", right[at : at + 300]


def _is_marked(command: str, name: str) -> bool:
    """Whether a command hands on a file whose size and digest the run knows."""
    if command == "push":
        return name in RELEASED
    # a training that begins reads them; of a run that is at its end nothing is read, and the published copy is mended
    return command == "go on" and name.startswith(f"{FIRST}/") and not name.endswith("step.json")


def _outcome(command: str, run: Path) -> tuple[int | None, str, Any]:
    """(exit code, None where a training begins; stderr; what came of it)."""
    home, out, err = prepared(), io.StringIO(), io.StringIO()
    config = run.parent / "c.yaml"
    write_yaml(config, settings(home / "base", home / "data", run, **CHANGES))
    arguments = {
        "report": ["report", str(run)],
        "push": ["push", str(run), "me/x", "--base-model-id", "me/base", "--dry-run"],
        "inspect": ["inspect", "--coefficient", str(run), "--json"],
        "evaluate": ["evaluate", "--config", str(config)],
    }.get(command, ["train", "--config", str(config)])
    begun: list = []

    def begins(built: Any, examples: Any, collate: Any, args: Any, **_: Any) -> None:
        begun.extend((_digest(built.model), _checkpoint(args.output_dir)))
        raise _BeginsError

    code: int | None = None
    patched = mock.patch.object(pm_hf.runs.learner, "train", begins)
    with redirect_stdout(out), redirect_stderr(err), _quick(), patched, suppress(_BeginsError):
        code = main(arguments)
    if code == BAD_INPUT:
        return code, err.getvalue(), None
    if begun:
        return code, err.getvalue(), begun
    if command == "report":
        return code, err.getvalue(), (run / "report.html").read_text()
    if command == "train":
        adapter = (run / "merged" / "adapter_model.safetensors").read_bytes()
        table = re.sub("merged adapter: .*", "", out.getvalue())
        return code, err.getvalue(), (hashlib.sha256(adapter).hexdigest(), table)
    return code, err.getvalue(), out.getvalue()


def _digest(model: Any) -> str:
    content = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        content.update(name.encode() + value.detach().float().numpy().tobytes())
    return content.hexdigest()


def _checkpoint(folder: str) -> str:
    """Whether the checkpoint that a training goes on from, if any, is one of those that were written."""
    newest = last_checkpoint(Path(folder))
    if newest is None:
        return "whole"
    written = prepared() / "stopped" / SECOND / "checkpoints" / Path(newest).name
    files = [path.relative_to(written) for path in written.rglob("*") if path.is_file()]
    there = {path.relative_to(newest) for path in Path(newest).rglob("*") if path.is_file()}
    odd = [
        str(file)
        for file in files
        if file not in there or (written / file).read_bytes() != (newest / file).read_bytes()
    ]
    return f"{newest} has other {odd}" if odd else "whole"


# ---- damage


def _damage(path: Path, how: str, place: int, what: Any) -> bool:
    """Damage a file; whether it shows: other bytes than were written, other kinds of values, no such file."""
    if not path.is_file():
        return False
    content, before = path.read_bytes(), _content(path)
    if how in ("gone", "folder", "link"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        if how == "link":
            path.symlink_to("nowhere")
        return path.name != "coefficient.json" or how == "folder"
    if how in ("value", "without"):
        if not isinstance(before, dict | list) or not (places := list(_places(before))):
            return False
        made = changed(before, places[place % len(places)], ... if how == "without" else what)
        dump = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
        path.write_bytes(dump(made).encode("utf-8", "surrogatepass"))
    else:
        at = place % max(1, len(content))
        damaged = {
            "flip": content[:at] + bytes([content[at] ^ (what or b"\1")[0]]) + content[at + 1 :] if content else b"",
            "cut": content[:at],
            "put": content[:at] + (what or b"") + content[at:],
            "zeros": bytes(len(content)),
            "whole": what,
        }[how]
        path.write_bytes(damaged)
    if path.suffix not in (".json", ".yaml"):
        return path.read_bytes() != content
    return _differs(before, _content(path))


def _content(path: Path) -> Any:
    """What a JSON or YAML file holds, ... where that cannot be read."""
    try:
        text = path.read_bytes().decode()
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text) if path.suffix == ".yaml" else ...
    except (ValueError, RecursionError, yaml.YAMLError):
        return ...


def _places(value: Any) -> Iterator[tuple]:
    """Every path of JSON content."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (key,)
        yield from ((key, *rest) for rest in _places(item))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number" if not isinstance(value, float) or math.isfinite(value) else "no number"
    return type(value).__name__


def _differs(old: Any, new: Any) -> bool:
    """Whether the kinds of values are others: a key that is gone, null, and an empty list may be of another version."""
    if old is None or new is None:
        return False
    if _kind(old) != _kind(new):
        return True
    if isinstance(old, dict):
        return any(_differs(old[key], new[key]) for key in old.keys() & new.keys())
    if isinstance(old, list):
        return bool(old) and any(all(_differs(one, item) for one in old) for item in new)
    return False

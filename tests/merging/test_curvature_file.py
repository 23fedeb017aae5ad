"""Curvature files: whole or refused, read a chunk of rows at a time, never mixed up with another task's."""

import json
import math
import resource
import subprocess
import sys

import pytest
import torch
from helpers.small_sums import FACTORED, FISHER, GRAM, OWNER, SHAPES, rewrite, stream, task
from safetensors.torch import save_file

from pm_hf.errors import InputError
from pm_hf.merging import curvature as kernel
from pm_hf.merging.coefficient import optimal_coefficient
from pm_hf.merging.curvature import CURVATURE_FORMAT, Curvature, FileTensors, accumulate, delta_probe, shape_of
from pm_hf.merging.lowrank import LowRank, add

both = pytest.mark.parametrize("settings", [FISHER, GRAM], ids=["fisher", "gram"])
every = pytest.mark.parametrize("settings", [FISHER, GRAM, FACTORED], ids=["fisher", "gram", "factored"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """One or two rows at a time."""
    monkeypatch.setattr(kernel, "CHUNK", 10)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.safetensors"


@every
def test_a_saved_file_comes_back_bit_for_bit(path, settings):
    saved = stream(settings, 3)[-1]
    saved.save(path)
    loaded = Curvature.load(path)
    for key in ("S", "M"):
        ours, theirs = getattr(saved, key), getattr(loaded, key)
        assert set(ours) == set(theirs)
        assert len(ours) == len(theirs)
        assert all(torch.equal(ours[name], theirs[name]) and theirs[name].dtype == torch.float32 for name in ours)
    for key in ("settings", "current", "past", "delta_norm", "probe", "examples", "owner", "nbytes"):
        assert getattr(loaded, key) == getattr(saved, key)
    assert set(loaded.probe) == set(SHAPES)
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]


def refuse_to_read(*_):
    raise AssertionError("a tensor was read")


@both
def test_loading_reads_the_header_alone(path, settings, monkeypatch):
    saved = stream(settings, 2)[-1]
    saved.save(path)
    monkeypatch.setattr(FileTensors, "rows", refuse_to_read)
    loaded = Curvature.load(path)
    assert (loaded.nbytes, loaded.tasks) == (saved.nbytes, 2)
    assert {name: shape_of(loaded.M, name) for name in loaded.M} == SHAPES
    with pytest.raises(AssertionError, match="a tensor was read"):
        loaded.sum_of("q")
    with pytest.raises(KeyError):
        shape_of(loaded.M, "down")


@both
def test_the_coefficient_from_a_file_is_the_one_from_memory_and_reads_a_chunk_at_a_time(path, settings, monkeypatch):
    second, (_, start), (_, delta) = stream(settings, 2)[-1], task(0, settings.kind), task(1, settings.kind)
    second.save(path)
    loaded, sizes, rows = Curvature.load(path), [], FileTensors.rows

    def watched(self, name, begin, end):
        found = rows(self, name, begin, end)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(FileTensors, "rows", watched)
    assert optimal_coefficient(delta, start, loaded) == optimal_coefficient(delta, start, second)
    assert 0 < max(sizes) <= kernel.CHUNK
    weights = sum(math.prod(shape) for shape in SHAPES.values())
    grams = sum(width**2 for _, width in SHAPES.values())  # the one of q serves v too, and is read for each
    assert sum(sizes) == weights + (weights if settings.kind == "fisher" else grams), "each sum is read once"


@every
def test_going_through_the_file_changes_no_bit_of_the_next_sums(path, settings):
    straight = stream(settings, 2)
    straight[0].save(path)
    owner = OWNER if settings.kind == "gram" else None
    (_, first), (measured, delta) = task(0, settings.kind), task(1, settings.kind)
    optimum = {name: add(first[name], d) for name, d in delta.items()}
    resumed = accumulate(measured, optimum, delta, settings, 11, owner=owner, previous=Curvature.load(path))
    resumed.save(path)  # over the very file that it continued
    loaded = Curvature.load(path)
    for found in (resumed, loaded):
        assert all(torch.equal(found.S[name], tensor) for name, tensor in straight[1].S.items())
        assert all(torch.equal(found.M[name], tensor) for name, tensor in straight[1].M.items())
        for key in ("examples", "current", "past"):
            assert getattr(found, key) == getattr(straight[1], key)


def test_shapes_that_do_not_continue_a_file_are_refused_without_reading_it(path, monkeypatch):
    stream(FISHER, 1)[0].save(path)
    measured, delta = task(1, "fisher")
    monkeypatch.setattr(FileTensors, "rows", refuse_to_read)
    with pytest.raises(InputError, match=r"does not fit this adapter.*q"):
        accumulate(measured | {"q": torch.ones(6, 8)}, delta, delta, FISHER, 3, previous=Curvature.load(path))


def test_saving_onto_the_file_it_is_read_from_keeps_every_bit(path):
    saved = stream(FISHER, 2)[-1]
    saved.save(path)
    loaded = Curvature.load(path)
    loaded.save(path)
    for found in (loaded, Curvature.load(path)):
        assert all(torch.equal(found.S[name], tensor) for name, tensor in saved.S.items())


def test_sums_whose_file_another_task_replaced_are_refused_not_mixed_up(path):
    first, second = stream(FISHER, 2)
    first.save(path)
    loaded = Curvature.load(path)
    second.save(path)
    with pytest.raises(InputError, match="was replaced by another since it was loaded; load it again"):
        loaded.sum_of("q")
    assert Curvature.load(path).tasks == 2
    path.unlink()
    with pytest.raises(InputError, match="can no longer be read"):
        loaded.sum_of("q")


@both
def test_sums_stored_in_bfloat16_are_read_in_float32(path, settings):
    saved = stream(settings, 2)[-1]
    saved.save(path)
    rewrite(path, lambda t, h: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    loaded, (_, delta) = Curvature.load(path), task(1, settings.kind)
    assert loaded.nbytes == saved.nbytes // 2
    rounded = Curvature(
        **(vars(saved) | {key: {n: t.bfloat16().float() for n, t in getattr(saved, key).items()} for key in "SM"})
    )
    for name, d in delta.items():
        assert loaded.sum_of(name).dtype == torch.float32
        assert torch.equal(loaded.sum_of(name), rounded.sum_of(name))
        assert loaded.quadratic(name, d, [d]) == rounded.quadratic(name, d, [d]) != saved.quadratic(name, d, [d])
        assert loaded.moment(name, d) == rounded.moment(name, d)


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"curvature file .*none.safetensors does not exist"):
        Curvature.load(tmp_path / "none.safetensors")


@every
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_an_input_error(path, share, settings):
    stream(settings, 1)[0].save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        Curvature.load(path)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"format": CURVATURE_FORMAT + "0", "curvature": json.dumps({})}]
)
def test_a_foreign_safetensors_file_is_an_input_error(path, metadata):
    save_file({"S.q": torch.ones(2, 2)}, path, metadata=metadata)
    with pytest.raises(InputError, match="is not a curvature file: expected format"):
        Curvature.load(path)


BROKEN = {
    "no header": (lambda t, h: h.clear(), "its header lacks current"),
    "unknown field": (lambda t, h: h.update(weather="fine"), "its header has a field weather"),
    "unknown setting": (lambda t, h: h["settings"].update(weather="fine"), "settings is not the fields of CurvatureS"),
    "kind": (lambda t, h: h["settings"].update(kind="kfac"), "kind 'kfac', 1 tasks"),
    "no task": (lambda t, h: h["examples"].clear(), "examples is not a list of positive whole numbers.*: "),
    "M missing": (lambda t, h: t.pop("M.up"), "M and current name different modules, first up"),
    "S missing": (lambda t, h: t.pop("S.up"), "S and M do not belong to the same modules"),
    "S without M": (lambda t, h: t.update({"S.v": t["S.q"].clone()}), "S and M do not belong to the same modules"),
    "norm missing": (
        lambda t, h: h["delta_norm"].pop("q"),
        "delta_norm and current name different modules, first q",
    ),
    "probe missing": (lambda t, h: h["probe"].pop("q"), "probe and current name different modules, first q"),
    "norm of text": (lambda t, h: h["delta_norm"].update(q="1"), "delta_norm is not {module: number}, none below 0"),
    "probe too short": (lambda t, h: h["probe"]["q"].pop(), "probe is not {module: list of 4 numbers}"),
    "owner unknown": (lambda t, h: h["owner"].update(down="q"), "S and M do not belong to the same modules"),
    "owner of another width": (lambda t, h: h["owner"].update(v="up"), r"M of v has shape \(3, 5\), its S \(7, 7\)"),
    "S of another width": (
        lambda t, h: t.update({"S.q": torch.ones(4, 4)}),
        r"M of \w has shape \(\d, 5\), its S \(4, 4\)",
    ),
    "M of one dimension": (lambda t, h: t.update({"M.v": torch.ones(15)}), r"M of v has shape \(15,\)"),
    "foreign tensor": (lambda t, h: t.update({"weight": torch.ones(2)}), "tensor weight is none of its sums"),
    "float64": (
        lambda t, h: t.update({"M.q": t["M.q"].double()}),
        "tensor M.q is none of its sums, or not in F32 or BF16",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_contradicts_itself_is_an_input_error(path, change, message):
    stream(GRAM, 1)[0].save(path)
    Curvature.load(path)
    rewrite(path, change)
    with pytest.raises(InputError, match=f"is not a sound curvature file: {message}.*; estimate the curvature again"):
        Curvature.load(path)


NUMBERS = {
    "text": "1",
    "true": True,
    "null": None,
    "list": [1.0],
    "NaN": math.nan,
    "infinite": math.inf,
    "digits": 10**400,
    "negative": -1.0,
}
ODD_VALUES = [("examples", value) for value in (5, "ab", ["ab"], [-5], [0], [1.5], [True], [math.nan], {"q": 1}, None)]
ODD_VALUES += [("probe", {"q": ["1"] * 4}), ("probe", {"q": [math.nan] * 4}), ("probe", [1]), ("probe", {"q": 4})]
ODD_VALUES += [("owner", {"q": 1}), ("owner", {"q": ["q"]}), ("owner", [["q", "q"]]), ("owner", "q"), ("owner", None)]
ODD_VALUES += [("settings", value) for value in (None, "gram", [], {"kind": 1}, {"shrinkage": "0"}, {"shrinkage": 2})]
ODD_VALUES += [(key, value) for key in ("current", "past", "delta_norm") for value in ([1.0], "q", 1, None)]


@pytest.mark.parametrize(("key", "value"), ODD_VALUES, ids=map(repr, ODD_VALUES))
def test_a_field_of_another_type_is_an_input_error_that_names_it(path, key, value):
    stream(GRAM, 1)[0].save(path)
    rewrite(path, lambda t, h: h.update({key: value}))
    with pytest.raises(InputError, match=f"is not a sound curvature file: {key} is not .*; estimate the curvature"):
        Curvature.load(path)


@pytest.mark.parametrize("value", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("key", ["current", "past", "delta_norm"])
def test_a_value_that_is_no_size_is_an_input_error_that_names_it(path, key, value):
    stream(FACTORED, 2)[-1].save(path)
    rewrite(path, lambda t, h: h[key].update(q=value))
    with pytest.raises(InputError, match=f"is not a sound curvature file: {key} is not .module: number., none below 0"):
        Curvature.load(path)


def test_a_form_that_rounding_puts_below_zero_is_read(path):
    stream(GRAM, 1)[0].save(path)
    rewrite(path, lambda t, h: h["current"].update(q=-1e-12 * h["current"]["up"]))
    assert Curvature.load(path).current["q"] < 0


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "3", '"settings"', "null", '{"settings": ' * 50_000, '{"examples": [' + "9" * 5000]
)
def test_a_header_without_fields_or_end_is_an_input_error(path, text):
    save_file({"S.q": torch.ones(2, 2)}, path, metadata={"format": CURVATURE_FORMAT, "curvature": text})
    with pytest.raises(InputError, match="is not a sound curvature file: its header ") as caught:
        Curvature.load(path)
    assert len(str(caught.value)) < 500


def test_a_fisher_whose_sums_have_two_shapes_is_an_input_error(path):
    stream(FISHER, 1)[0].save(path)
    rewrite(path, lambda t, h: t.update({"S.q": torch.ones(5, 6)}))
    with pytest.raises(InputError, match=r"M of q has shape \(6, 5\), its S \(5, 6\)"):
        Curvature.load(path)


def test_a_header_that_is_no_json_is_an_input_error(path):
    save_file({"S.q": torch.ones(2, 2)}, path, metadata={"format": CURVATURE_FORMAT, "curvature": "{"})
    with pytest.raises(InputError, match="its header cannot be read"):
        Curvature.load(path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path):
    first, second = stream(FISHER, 2)
    first.save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"curvature file .*c.safetensors \(0 MB\) cannot be written"):
            second.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]


def test_a_failed_sync_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    first, second = stream(FISHER, 2)
    first.save(path)
    before = path.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel.os, "fsync", fail)
    with pytest.raises(OSError, match=r"cannot be written: .*No space left"):
        second.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["c.safetensors"]


MEASURE = """
import sys, threading, time
import torch
from pm_hf.merging import Curvature, LowRank, optimal_coefficient

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

torch.ones(512, 512) @ torch.ones(512, 512)  # buffers of the matrix product
start, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
curvature = Curvature.load(sys.argv[1])
delta = {name: LowRank(torch.ones(1024, 1), torch.ones(1, 1024)) for name in curvature.M}
optimal_coefficient(delta, delta, curvature)
done.set()
thread.join()
print(peak[0] - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RssAnon is Linux's")
def test_memory_for_a_coefficient_does_not_grow_with_the_file(path):
    modules, size, ones = [f"layer {i}" for i in range(24)], 1024, torch.ones(1024, 1024)
    probe = {name: delta_probe(name, LowRank(ones[:, :1], ones[:1])) for name in modules}
    header = {"settings": vars(FISHER), "examples": [8], "probe": probe}
    header |= {"current": dict.fromkeys(modules, size**2), "delta_norm": dict.fromkeys(modules, size)}
    tensors = {f"{key}.{name}": ones.clone() for key in "SM" for name in modules}
    save_file(tensors, path, metadata={"format": CURVATURE_FORMAT, "curvature": json.dumps(header)})
    command = [sys.executable, "-c", MEASURE, str(path)]
    increase = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert path.stat().st_size > 200e6
    assert 0 < increase < 64, "MB: a few chunks, not the sums"

"""Files that a run depends on are compared by content when it goes on."""

import json
import shutil

import pytest
from helpers import flip
from helpers.kills import stops_after_checkpoint
from helpers.streams import FEW, contents, language_settings, same_tensors, settings, steps

from pm_hf.config.loading import load_config
from pm_hf.data.stream import TaskStream, load_stream
from pm_hf.errors import InputError
from pm_hf.runs import inputs
from pm_hf.runs.inputs import changed_inputs, file_digest, run_inputs
from pm_hf.runs.learner import learn

CHANGES = {**FEW, "training__save_strategy": "epoch"}


@pytest.fixture(scope="module")
def data(stream_data):
    return stream_data(8)


@pytest.fixture
def base(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture(scope="module")
def one_task(tiny_base, data, tmp_path_factory):
    """(base, folder) of a run of one task; copies are moved to where it was made, by name."""
    place = tmp_path_factory.mktemp("one")
    base = shutil.copytree(tiny_base, place / "base")
    learn(settings(base, data, place / "run", groups=1, **CHANGES))
    return base, place / "run"


def edit(file):
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1) + " ")


@pytest.mark.parametrize(
    ("name", "change"),
    [("model.safetensors", flip), ("config.json", edit), ("tokenizer.json", edit), ("tokenizer_config.json", edit)],
)
def test_a_run_does_not_go_on_with_another_base_of_the_same_name(one_task, data, tmp_path, name, change):
    base, run = one_task
    folder, before = shutil.copytree(run, tmp_path / "run"), (base / name).read_bytes()
    try:
        change(base / name)
        with pytest.raises(InputError, match=f"holds another run; .*: model.base: {name} is not what it was") as caught:
            learn(settings(base, data, folder, groups=2, **CHANGES))
    finally:
        (base / name).write_bytes(before)
    assert "\n" not in str(caught.value)
    assert contents(folder) == contents(run)


def test_other_files_beside_the_base_do_not_matter(one_task, data, tmp_path):
    base, run = one_task
    folder = shutil.copytree(run, tmp_path / "run")
    (base / "README.md").write_text("new")
    (base / "train.json").write_text("[]")
    learn(settings(base, data, folder, groups=2, **CHANGES))
    assert [step["inputs"] for step in steps(folder)] == [steps(run)[0]["inputs"]] * 2


def test_a_task_that_was_begun_on_another_base_begins_anew_and_says_so(base, data, tmp_path, capsys):
    with stops_after_checkpoint():
        learn(settings(base, data, tmp_path / "run", groups=1, **CHANGES))
    assert list(tmp_path.glob("run/task-00-first/checkpoints/checkpoint-*"))
    flip(base / "model.safetensors")
    learn(settings(base, data, tmp_path / "run", groups=1, **CHANGES))
    said = capsys.readouterr().err
    assert "task first: model.base: model.safetensors is not what it was since its checkpoints were written" in said
    learn(settings(base, data, tmp_path / "fresh", groups=1, **CHANGES))
    assert same_tensors(tmp_path / "run" / "merged", tmp_path / "fresh" / "merged")


def read(base, data, tmp_path, **changes):
    config = load_config(settings(base, data, tmp_path / "run", **changes))
    return run_inputs(config, TaskStream("class_incremental", ()))


def test_everything_that_has_content_of_its_own_is_in_it(one_task, base, data, tmp_path, language_data):
    (tmp_path / "fsdp.json").write_text("{}")
    adapter = one_task[1] / "merged"
    found = read(base, data, tmp_path, start_from=str(adapter), training__fsdp_config=str(tmp_path / "fsdp.json"))
    assert set(found["model.base"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(found["start_from"]) >= {"adapter_model.safetensors", "adapter_config.json", "labels.json"}
    assert set(found["training"]) == {"fsdp_config"}
    (tmp_path / "fsdp.json").write_text('{"version": 2}')
    flip(base / "model.safetensors")
    now = read(base, data, tmp_path, start_from=str(adapter), training__fsdp_config=str(tmp_path / "fsdp.json"))
    assert changed_inputs(now, found) == [
        "model.base: model.safetensors is not what it was",
        "training: fsdp_config is not what it was",
    ]
    assert changed_inputs(now, {}) == changed_inputs({}, now) == []  # of another version


def test_held_out_texts_are_in_it(language_data, tmp_path):
    held = [{"name": "held", "test": "held.jsonl", "prompt_template": ""}]
    config = load_config(language_settings(language_data, tmp_path / "run", stream__held_out=held))
    stream = load_stream(config)
    assert run_inputs(config, stream)["stream.held_out"] == {"held": stream.held_out[0].test_fingerprint()}


def test_a_large_file_is_looked_at_in_many_places(tmp_path, monkeypatch):
    for name, value in (("WHOLE", 1000), ("BLOCK", 10), ("BLOCKS", 8)):
        monkeypatch.setattr(inputs, name, value)
    file, content = tmp_path / "x", bytes(range(250)) * 40
    file.write_bytes(content)
    whole = file_digest(file)
    for changed in (content[::-1], content[:-1], content + b"x", b"y" + content[1:], content[:-1] + b"y"):
        file.write_bytes(changed)
        assert file_digest(file) != whole
    file.write_bytes(content[:5] + content[5:])
    assert file_digest(file) == whole


def test_a_model_of_the_hub_is_known_by_its_commit(tiny_base, data, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "model.base" not in read("owner/name", data, tmp_path)
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc\n")
    assert read("owner/name", data, tmp_path)["model.base"] == {"commit": "abc"}
    assert read("owner/name", data, tmp_path, model__revision="v1")["model.base"] == {"commit": "v1"}

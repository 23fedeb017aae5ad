"""Whatever an adapter folder holds: it is merged as PEFT means it, or refused by one InputError before any work."""

import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.adapter_folders import CONFIG, HEAD, PREFIX, WEIGHTS, head, tree, write_folder
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pm_hf import InputError, describe, merge_adapters

KEYS = [
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "target_modules", "bias"),
    *("exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "lora_bias", "auto_mapping"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "target_parameters", "ensure_weight_tying"),
    *("fan_in_fan_out", "use_dora", "init_r", "eva_config", "loftq_config", "weather"),
]
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 0, 1, 2, True, 1e-320, 2.0])
TEXTS = st.text(max_size=6) | st.sampled_from(
    ["", "(", "q", "LORA", "ADALORA", "none", "\x1b[2J", "\u202e", "a\0b", "/", "~"]
)
ATOMS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(ATOMS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=4)
PARTS = st.sampled_from(
    [
        *("module", "base_model", "model", "_orig_mod", "layers", "0", "q", "lora_A", "lora_B", "lora_E", "weight"),
        *("default", "modules_to_save", "original_module", "base_layer", "lora_embedding_A", "classifier", "bias", ""),
    ]
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64)
TENSORS = st.dictionaries(
    st.lists(PARTS, min_size=1, max_size=7).map(".".join) | TEXTS.filter(bool),
    st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)),
    max_size=2,
)
CHANGES = st.fixed_dictionaries(
    {
        "config": st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=2),
        "tensors": TENSORS,
        "labels": st.none() | VALUES,
        "report": st.none() | VALUES,
        "prefix": st.sampled_from([PREFIX, "", "module." + PREFIX]),
    }
)
NOTHING = {"config": {}, "tensors": {}, "labels": None, "report": None, "prefix": PREFIX}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("fuzz") / "sound", saved=head(2, 1), labels={HEAD: ["x", "y"]})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES)
@example(changes=NOTHING)
@example(changes=NOTHING | {"config": {"lora_alpha": 10**400}})
@example(changes=NOTHING | {"config": {"layers_to_transform": "0"}})
@example(changes=NOTHING | {"report": {"tasks": 10**400}})
@example(changes=NOTHING | {"config": {"base_model_name_or_path": "a\0b"}})
def test_any_folder_is_merged_or_refused(sound, changes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "odd"
        shutil.copytree(sound, folder)
        config = json.loads((folder / CONFIG).read_text()) | changes["config"]
        (folder / CONFIG).write_text(json.dumps(config))
        added = {changes["prefix"] + n: torch.ones(shape).to(kind) for n, (shape, kind) in changes["tensors"].items()}
        save_file(load_file(folder / WEIGHTS) | added, folder / WEIGHTS, {"format": "pt"})
        for file, value in (("labels.json", changes["labels"]), ("merge_report.json", changes["report"])):
            if value is not None:
                (folder / file).write_text(json.dumps(value))
        before, refusal = tree(Path(name)), None
        try:
            merge_adapters([sound, folder], Path(name) / "out", method="average")
            describe(folder)
        except InputError as error:
            refusal = str(error)
        if refusal is not None:
            assert len(refusal.splitlines()) == 1
            assert "\x1b" not in refusal
            assert (Path(name) / "out").exists() or tree(Path(name)) == before
        else:
            merged = load_file(Path(name) / "out" / WEIGHTS)
            assert all(math.isfinite(float(value.double().abs().sum())) for value in merged.values())

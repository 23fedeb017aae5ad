"""Adapters that are refused: by name, before anything is written, with a way out that PEFT can run."""

import shutil

import pytest
import torch
from helpers.adapter_folders import edited, refused
from helpers.peft_adapters import (
    KINDS,
    NET,
    PLAIN,
    Kind,
    build,
    distance,
    llama,
    load,
    outputs,
    save,
    seeded,
    update,
    wrap,
)
from helpers.peft_refused import REFUSED, Trained, convert, exists, trained

from pm_hf import merge_adapters

CONVERTED = [name for name, row in REFUSED.items() if row.convert is not None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.set_num_threads(1)
    return build(KINDS["plain"], tmp_path_factory.mktemp("plain"))[0]


def test_every_refused_kind_is_listed():
    assert (len(REFUSED), len(CONVERTED)) == (30, 25)


def made(name, folder) -> Trained:
    """A trained adapter of the kind."""
    if not exists(name):
        pytest.skip(f"the installed PEFT has no {name}")
    return trained(name, folder)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_the_way_out(name, plain, tmp_path):
    row, path = REFUSED[name], made(name, tmp_path).path
    for adapters in (path, [plain, path]):
        named = f"{row.named}.*{row.way_out}"
        message = refused(tmp_path, named, adapters, tmp_path / "merged", method="average")
        assert message.startswith(f"adapter {path}: ")


@pytest.mark.parametrize("name", CONVERTED)
def test_the_way_out_gives_an_adapter_that_merges_exactly(name, tmp_path):
    found = made(name, tmp_path)
    converted = convert(found, tmp_path / "converted")
    merge_adapters(converted, tmp_path / "merged", method="average")
    assert distance(update(Kind(NET, PLAIN), tmp_path / "merged"), found.update) <= 2e-6


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "XLORA"])
def test_methods_that_change_no_weights_have_no_way_out(method, plain, tmp_path):
    path = edited(shutil.copytree(plain, tmp_path / "adapter"), peft_type=method)
    message = refused(tmp_path, f"found {method}", path, tmp_path / "merged", method="average")
    assert "train a LoRA" in message
    assert "merge_and_unload" not in message


def test_loftq_merges_on_the_base_that_it_was_trained_on(plain, tmp_path):
    path = edited(shutil.copytree(plain, tmp_path / "loftq"), init_lora_weights="loftq")  # PEFT needs CUDA to make one
    refused(tmp_path, "name the quantised base", path, tmp_path / "merged", method="average")
    edited(path, init_lora_weights=True, base_model_name_or_path="the/quantised-base")
    merge_adapters(path, tmp_path / "merged", method="average")
    assert distance(update(KINDS["plain"], tmp_path / "merged"), update(KINDS["plain"], plain)) <= 1e-6


def test_a_replicated_adapter_merges_on_the_expanded_base(tmp_path):
    from peft import LoraConfig
    from transformers import LlamaForCausalLM

    found = trained("layer replication", tmp_path)
    kind = Kind(lambda: seeded(llama), found.row.settings)
    before = outputs(kind, found.path)
    expanded = wrap(kind.model(), LoraConfig(**kind.first)).unload()
    save(expanded, tmp_path / "base", state_dict={k: v.clone() for k, v in expanded.state_dict().items()})
    merge_adapters(edited(found.path, layer_replication=None), tmp_path / "merged", method="average")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        after = load(base, tmp_path / "merged").double()(kind.inputs()).logits
    assert torch.allclose(after, before, rtol=1e-6, atol=1e-7)

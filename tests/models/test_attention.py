"""The implementation of attention that is asked for is the one that computes, whatever is loaded."""

import pytest
import torch
from helpers import refusal
from helpers.models import LENGTH, save_vit, tiny_folder
from helpers.streams import language_settings, settings, write_base

from pm_hf.config.loading import load_config
from pm_hf.config.schema import ModelSettings
from pm_hf.models.loading import load_base
from pm_hf.runs.learner import learn

KINDS = {
    "bert": "text-classification",
    "vit": "image-classification",
    "llama": "causal-lm",
    "t5": "seq2seq-lm",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "bert")
    save_vit(folder / "vit")
    for name in ("llama", "t5"):
        tiny_folder(name, folder / name)
    return folder


def load(folder, kind, attention, **more):
    labels = ("a", "b") if "classification" in kind else ()
    return load_base(ModelSettings(str(folder), attn_implementation=attention), labels, 0, kind, **more)[0]


@pytest.mark.parametrize("skeleton", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_computes_attention_as_asked(bases, name, skeleton):
    for attention in ("eager", "sdpa"):
        model = load(bases / name, KINDS[name], attention, skeleton=skeleton)
        assert model.config._attn_implementation == attention


def test_both_ways_give_the_same(bases):
    ids = torch.arange(8, LENGTH // 2)[None]
    eager, sdpa = (load(bases / "llama", "causal-lm", name)(ids).logits for name in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-5)
    assert not torch.equal(eager, sdpa)


@pytest.mark.parametrize(
    ("name", "need"),
    [
        ("flash_attention_2", "a GPU and the package flash-attn"),
        ("flash_attention_3", "a GPU and the package flash-attn-3"),
        ("flex_attention", "a GPU, as it has no gradient on a CPU"),
    ],
)
def test_what_is_not_there_is_named_and_no_kernel_is_fetched(bases, name, need, monkeypatch):
    def fetched(*_, **__):
        raise AssertionError("a kernel of the Hub was asked for")

    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", fetched)
    message = refusal(load, bases / "llama", "causal-lm", name)
    assert f"model.attn_implementation {name} needs {need}, which is not there; use sdpa" in message


def test_it_stands_in_the_run_s_settings_and_is_one_of_a_few(tiny_base, stream_data, language_data, tmp_path):
    changes = {"groups": 1, "model__attn_implementation": "eager", "training__max_steps": 1}
    config = settings(tiny_base, stream_data(12), tmp_path / "run", "average", **changes)
    learn(config)
    assert load_config(tmp_path / "run" / "config.yaml").model.attn_implementation == "eager"
    message = refusal(learn, config | {"model": {"base": str(tiny_base), "attn_implementation": "sdpa"}})
    assert "model.attn_implementation: 'eager' in the finished run, 'sdpa' now" in message
    wrong = language_settings(language_data, tmp_path / "wrong", model__attn_implementation="flash")
    assert "model.attn_implementation: expected eager or sdpa or flash_attention_2" in refusal(load_config, wrong)

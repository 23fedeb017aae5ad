"""Embeddings of new tokens in a merge: rows are matched by the tokenizers beside the adapters, which it keeps."""

import json
import random
import shutil

import pytest
import torch
from helpers import adapter_folders
from helpers.adapter_folders import SHAPES, peft_quiet, saved_tensors, write_folder
from helpers.tokenizers import word_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pm_hf import merge_adapters
from pm_hf.cli import main

H, WORDS = 16, 40
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = (EMBED, HEAD)


def table(rows, seed):
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(seed))


def adapter(path, seed, rows, *added, tokenizer=True, names=TABLES, copies=False, tables=None, **config):
    """An adapter whose embeddings have `rows` rows, beside a tokenizer of WORDS words and `added` tokens."""
    saved = tables or {name: table(rows, 10 * seed + i) for i, name in enumerate(names)}
    config = {"modules_to_save": None if copies else ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"} | config
    write_folder(path, seed=seed, saved=saved, config=config)
    if tokenizer:
        word_tokenizer(path, WORDS, *added)
    return path


def vocabulary(path):
    return {row: token for token, row in AutoTokenizer.from_pretrained(path).get_vocab().items()}


def by_token(path, name):
    """{token: row}; rows without a token by their number."""
    tokens = vocabulary(path)
    return {tokens.get(i, i): row for i, row in enumerate(saved_tensors(path)[name])}


def merged(tmp_path, *folders, **more):
    report = merge_adapters(list(folders), tmp_path / "out", method="average", **more)
    return tmp_path / "out", report


def expected(folders, name, weights):
    """{token: mean over the adapters that have it}, the slow way."""
    tables = [by_token(folder, name) for folder in folders]
    rows = {}
    for token in dict.fromkeys(token for own in tables for token in own):
        having = [(own[token], w) for own, w in zip(tables, weights, strict=True) if token in own]
        rows[token] = sum(w * row for row, w in having) / sum(w for _, w in having)
    return rows


def assert_rows(path, name, wanted):
    rows = by_token(path, name)
    assert set(rows) == set(wanted)
    assert all(torch.allclose(rows[token], wanted[token], atol=1e-6) for token in wanted)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["<a>"], ["<b>"]),
        (["<a>", "<b>"], ["<b>", "<a>"]),
        (["<a>"], ["<b>", "<a>"]),
        (["<a>", "<b>"], ["<a>"]),
        ([], ["<a>"]),
        (["<a>", "<x>", "<b>"], ["<c>", "<a>"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [None, [0.25, 0.75]])
def test_rows_are_matched_by_token(tmp_path, first, second, weights):
    a = adapter(tmp_path / "a", 1, WORDS + len(first), *first)
    b = adapter(tmp_path / "b", 2, WORDS + len(second), *second)
    out, report = merged(tmp_path, a, b, weights=weights)
    for name in TABLES:
        assert_rows(out, name, expected([a, b], name, weights or [0.5, 0.5]))
        assert len(saved_tensors(out)[name]) == WORDS + len({*first, *second})
        assert report.heads[name] == f"by token, {WORDS + len({*first, *second})} rows"


@pytest.mark.parametrize("seed", range(8))
def test_any_tokens_in_any_order(tmp_path, seed):
    draw = random.Random(seed)
    folders = []
    for i in range(3):
        added = draw.sample([f"<{x}>" for x in "abcde"], draw.randrange(6))
        folders.append(adapter(tmp_path / f"{i}", i, WORDS + len(added), *added))
    weights = [0.2, 0.3, 0.5]
    out, _ = merged(tmp_path, *folders, weights=weights)
    for name in TABLES:
        assert_rows(out, name, expected(folders, name, weights))


def test_one_vocabulary_is_blended_whole_and_its_tokenizer_kept(tmp_path):
    a, b = adapter(tmp_path / "a", 1, WORDS + 1, "<a>"), adapter(tmp_path / "b", 2, WORDS + 1, "<a>")
    out, report = merged(tmp_path, a, b)
    for name in TABLES:
        half = sum(saved_tensors(folder)[name] * 0.5 for folder in (a, b))
        assert torch.equal(saved_tensors(out)[name], half)
        assert report.heads[name] == "by coefficient"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (b / name).read_bytes()
    assert report.tokenizer == str(b)


def test_a_fold_of_three_tasks_with_a_token_each(tmp_path):
    folders = [adapter(tmp_path / x, i, WORDS + 1, f"<{x}>") for i, x in enumerate("abc")]
    merge_adapters(folders[0], tmp_path / "m0", method="average")
    merge_adapters(folders[1], tmp_path / "m1", into=tmp_path / "m0", coefficient=0.5)
    merge_adapters(folders[2], tmp_path / "m2", into=tmp_path / "m1", coefficient=1 / 3)
    third = expected(folders, EMBED, [1 / 3] * 3)
    assert_rows(tmp_path / "m2", EMBED, third)
    assert list(vocabulary(tmp_path / "m2").values())[-3:] != []
    assert {vocabulary(tmp_path / "m2")[row] for row in range(WORDS, WORDS + 3)} == {"<a>", "<b>", "<c>"}
    merge_adapters(folders[0], tmp_path / "m0", method="average", overwrite=True)  # with the tokenizer of before in it


def test_padding_rows_take_the_token_of_the_adapter_that_has_one(tmp_path):
    a, b = adapter(tmp_path / "a", 1, 48, "<a>"), adapter(tmp_path / "b", 2, 48, "<b>")
    out, _ = merged(tmp_path, a, b)
    rows = by_token(out, EMBED)
    assert len(rows) == 48
    assert torch.equal(rows["<a>"], by_token(a, EMBED)["<a>"])
    assert torch.equal(rows["<b>"], by_token(b, EMBED)["<b>"])


def test_without_tokenizers_rows_of_one_vocabulary_are_blended(tmp_path):
    a, b = (adapter(tmp_path / x, i, WORDS, tokenizer=False) for i, x in enumerate("ab"))
    out, report = merged(tmp_path, a, b)
    assert torch.equal(saved_tensors(out)[EMBED], sum(saved_tensors(folder)[EMBED] * 0.5 for folder in (a, b)))
    assert report.tokenizer is None
    assert not (out / "tokenizer.json").exists()


def refused(tmp_path, message, *folders, **more):
    """The one line that refuses their merge."""
    return adapter_folders.refused(tmp_path, message, list(folders), tmp_path / "out", method="average", **more)


def base_model(path, rows):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    return str(path)


def test_new_rows_that_nothing_names_are_refused(tmp_path):
    base = {"base_model_name_or_path": base_model(tmp_path / "base", WORDS)}
    a, b = (adapter(tmp_path / x, i, WORDS + 1, tokenizer=False, **base) for i, x in enumerate("ab"))
    text = refused(tmp_path, "have 41 rows, the base's 40, and differ", a, b)
    assert "save it into each folder; or take one adapter's as it is: rows_from=ADAPTER" in text
    c = adapter(tmp_path / "c", 3, WORDS + 2, tokenizer=False, **base)
    refused(tmp_path, "different shapes, rows: 41 in .*a, 42 in .*c", a, c)
    d = adapter(tmp_path / "d", 3, WORDS + 1, "<d>", **base)
    refused(tmp_path, f"row 40 is the new token '<d>' in another adapter, and no tokenizer beside {a}", a, d)
    out, report = merged(tmp_path, a, d, rows_from=d)
    assert torch.equal(saved_tensors(out)[EMBED], saved_tensors(d)[EMBED])
    assert vocabulary(out)[WORDS] == "<d>"
    assert report.heads[EMBED] == f"from {d}"


def test_rows_that_are_called_the_same_in_all_are_blended_as_they_stand(tmp_path):
    base = {"base_model_name_or_path": base_model(tmp_path / "base", WORDS)}
    a, b = (adapter(tmp_path / x, i, WORDS + 1, tokenizer=False, **base) for i, x in enumerate("ab"))
    (b / "labels.json").write_text(json.dumps({name.removesuffix(".weight"): None for name in TABLES}))
    out, _ = merged(tmp_path, a, b)
    for name in TABLES:
        assert torch.equal(saved_tensors(out)[name], sum(saved_tensors(folder)[name] * 0.5 for folder in (a, b)))


def test_an_adapter_without_new_rows_has_the_tokenizer_of_the_base(tmp_path):
    base = {"base_model_name_or_path": base_model(tmp_path / "base", 48)}
    word_tokenizer(tmp_path / "base", WORDS, "<base>")
    a, b = (
        adapter(tmp_path / "a", 1, 48, "<base>", "<a>", **base),
        adapter(tmp_path / "b", 2, 48, tokenizer=False, **base),
    )
    out, _ = merged(tmp_path, a, b)
    one, two, both = (saved_tensors(folder)[EMBED] for folder in (a, b, out))
    assert torch.equal(both[WORDS + 1], one[WORDS + 1])
    kept = [i for i in range(48) if i != WORDS + 1]
    assert torch.allclose(both[kept], (one[kept] + two[kept]) / 2)


def test_equal_embeddings_need_no_tokenizer_of_their_own(tmp_path):
    tables = {name: table(WORDS + 1, i) for i, name in enumerate(TABLES)}
    a = adapter(tmp_path / "a", 1, 0, "<a>", tables=tables)
    b = adapter(tmp_path / "b", 2, 0, tokenizer=False, tables=tables)
    for order in ([a, b], [b, a]):
        out, _ = merged(tmp_path, *order)
        assert torch.equal(saved_tensors(out)[EMBED], tables[EMBED])
        assert vocabulary(out)[WORDS] == "<a>"
        shutil.rmtree(out)


def test_rows_that_would_have_to_move_where_they_cannot(tmp_path):
    a = adapter(tmp_path / "a", 1, WORDS + 1, "<a>")
    b = adapter(tmp_path / "b", 2, WORDS + 1, "<b>", names=[EMBED])
    refused(tmp_path, "b has no lm_head.weight, which another has", a, b)
    shapes = SHAPES | {"lm_head": (WORDS + 1, H)}
    for i, x in enumerate("cd"):
        write_folder(tmp_path / x, shapes, seed=i)
        word_tokenizer(tmp_path / x, WORDS, f"<{x}>")
    text = refused(tmp_path, "adapts lm_head by LoRA, whose rows cannot be moved", tmp_path / "c", tmp_path / "d")
    assert "rows_from" not in text


# copies of the base's embeddings, which PEFT writes along when the vocabulary was resized
def resized(path, seed, rows, *added, base=0, tokenizer=True):
    tables = {name: torch.cat([table(WORDS, base + i), table(rows, 10 * seed + i)]) for i, name in enumerate(TABLES)}
    return adapter(path, seed, 0, *added, tables=tables, copies=True, tokenizer=tokenizer)


def test_copies_that_differ_in_new_rows_only(tmp_path, capsys):
    a, b = resized(tmp_path / "a", 1, 1, "<a>"), resized(tmp_path / "b", 2, 1, "<a>")
    text = refused(
        tmp_path, "one base, and copies of it that differ in 1 of 41 rows only, first row 40 \\('<a>'\\)", a, b
    )
    assert "drawn anew" in text
    assert "rows_from=ADAPTER (--rows-from)" in text
    for chosen in (a, b):
        arguments = ["merge", str(a), str(b), "--method", "average", "--output", str(tmp_path / "out"), "--overwrite"]
        assert main([*arguments, "--rows-from", str(chosen)]) == 0
        assert all(torch.equal(saved_tensors(tmp_path / "out")[n], saved_tensors(chosen)[n]) for n in TABLES)
    capsys.readouterr()
    refused(tmp_path, "rows_from= names one of the adapters, found nobody", a, b, rows_from="nobody", overwrite=True)


def test_copies_without_tokenizers_that_differ_in_new_rows_only(tmp_path):
    a, b = (resized(tmp_path / x, i, 1, tokenizer=False) for i, x in enumerate("ab"))
    refused(tmp_path, "differ in 1 of 41 rows only, first row 40: rows of new tokens", a, b)


def test_copies_with_tokens_of_their_own_stand_side_by_side(tmp_path):
    a, b = resized(tmp_path / "a", 1, 1, "<a>"), resized(tmp_path / "b", 2, 1, "<b>")
    out, report = merged(tmp_path, a, b)
    assert_rows(out, EMBED, by_token(a, EMBED) | {"<b>": by_token(b, EMBED)["<b>"]})
    assert report.heads[EMBED] == "copies of the base, by token"


@pytest.mark.parametrize("added", ["<a>", "<b>"])
def test_copies_of_different_bases(tmp_path, added):
    a, b = resized(tmp_path / "a", 1, 1, "<a>"), resized(tmp_path / "b", 2, 1, added, base=7)
    text = refused(tmp_path, "differs between the adapters: not one base", a, b)
    assert "rows_from" not in text


# LoRA alone: the rows are the base's
def test_the_tokenizer_beside_plain_adapters_is_kept(tmp_path):
    for i, (x, added) in enumerate({"a": [], "b": ["<b>"], "c": ["<c>"]}.items()):
        word_tokenizer(write_folder(tmp_path / x, seed=i), WORDS, *added)
    write_folder(tmp_path / "d", seed=4)
    for names, kept in (("ab", "b"), ("ba", "b"), ("ad", "a"), ("da", "a"), ("bc", None), ("aa", "a")):
        out, report = merged(tmp_path, *(tmp_path / x for x in names), overwrite=True)
        assert report.tokenizer == (None if kept is None else str(tmp_path / kept))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (out / name).exists() == (kept is not None)
            assert kept is None or (out / name).read_bytes() == (tmp_path / kept / name).read_bytes()


def test_a_tokenizer_that_nothing_can_read_is_no_reason_to_refuse_plain_adapters(tmp_path):
    for i, x in enumerate("ab"):
        (write_folder(tmp_path / x, seed=i) / "tokenizer.json").write_text("{" + x)
    out, report = merged(tmp_path, tmp_path / "a", tmp_path / "b")
    assert report.tokenizer is None
    assert not (out / "tokenizer.json").exists()
    out, report = merged(tmp_path, tmp_path / "a", overwrite=True)
    assert (out / "tokenizer.json").read_text() == "{a"


# against PEFT: a token's row is its row in the model that is loaded
def language_model(rows):
    torch.manual_seed(0)
    shape = {"hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=WORDS, pad_token_id=0, tie_word_embeddings=False, **shape)
    model = LlamaForCausalLM(config).eval()
    torch.manual_seed(1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def test_the_merge_loads_and_its_tokens_mean_what_they_meant(tmp_path):
    folders, models = [], []
    for seed, token in enumerate(("<a>", "<b>")):
        with peft_quiet():
            model = get_peft_model(
                language_model(WORDS + 1),
                LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
            )
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.data += torch.randn(parameter.shape, generator=generator)
            model.peft_config["default"].base_model_name_or_path = "tiny/base"
            model.save_pretrained(tmp_path / token, save_embedding_layers=False)
        folders.append(word_tokenizer(tmp_path / token, WORDS, token))
        models.append(model.eval())
    out, _ = merged(tmp_path, *folders)
    tokenizer = AutoTokenizer.from_pretrained(out)
    with peft_quiet():
        loaded = PeftModel.from_pretrained(language_model(len(tokenizer)), out).eval()
    for token, model, folder in zip(("<a>", "<b>"), models, folders, strict=True):
        own = AutoTokenizer.from_pretrained(folder)
        for words in (token, f"w3 {token}"):
            before, after = (t(words)["input_ids"] for t in (own, tokenizer))
            embedded = [m.get_input_embeddings()(torch.tensor(ids)) for m, ids in ((model, before), (loaded, after))]
            assert torch.equal(embedded[0][-1], embedded[1][-1])

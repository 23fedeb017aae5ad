"""Tokenizers beside adapters: what they name, which rows are one token, the tokenizer of a merge."""

import json

import pytest
from helpers.tokenizers import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pm_hf import InputError
from pm_hf.adapters.download import base_config_file
from pm_hf.adapters.tokens import Tokens, match_tokens, read_tokens, tokenizer_files, vocabulary_size

WORDS = 6


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def names(tokens):
    return [tokens.names.get(row) for row in range(max(tokens.names, default=-1) + 1)]


def test_no_tokenizer(tmp_path):
    assert read_tokens(write(tmp_path / "a")) is None
    assert read_tokens(write(tmp_path / "b", tokenizer_config={})) == Tokens(tmp_path / "b")


def test_a_whole_tokenizer(tmp_path):
    tokens = read_tokens(word_tokenizer(tmp_path / "a", WORDS, "<a>", "<b>"))
    assert names(tokens) == [*(f"w{i}" for i in range(WORDS)), "<a>", "<b>"]
    assert set(tokens.added) == {WORDS, WORDS + 1}  # not w0, a special token of the vocabulary
    assert tokens.complete


def test_a_vocabulary_of_pieces(tmp_path):
    model = {"vocab": [["<s>", 0.0], ["a", -1.5]]}
    tokens = read_tokens(write(tmp_path / "a", tokenizer={"model": model, "added_tokens": None}))
    assert tokens.names == {0: "<s>", 1: "a"}


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<a>": 50}},
        {"tokenizer_config": {"added_tokens_decoder": {"50": {"content": "<a>", "special": True}}}},
        {
            "added_tokens": {"<a>": 50},
            "tokenizer_config": {"added_tokens_decoder": {"50": {"content": "<a>", "special": True}}},
        },
    ],
)
def test_added_tokens_alone(tmp_path, files):
    tokens = read_tokens(write(tmp_path / "a", **files))
    assert (tokens.names, set(tokens.added), tokens.complete) == ({50: "<a>"}, {50}, False)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": []}, r"tokenizer\.json holds a list"),
        ({"tokenizer": {"model": {}}}, r"tokenizer\.json has no model\.vocab"),
        ({"tokenizer": {"model": {"vocab": {"a": "0"}}}}, "expected tokens with their numbers, found 'a' at '0'"),
        ({"tokenizer": {"model": {"vocab": {"a": [0]}}}}, r"found 'a' at \[0\]"),
        ({"tokenizer": {"model": {"vocab": [[["a"], 0.0]]}}}, r"found \['a'\] at 0"),
        ({"tokenizer": {"model": {"vocab": [1]}}}, r"tokenizer\.json has no model\.vocab"),
        (
            {"tokenizer": {"model": {"vocab": {"a": 0, "b": 0}}}},
            "token 0 is 'b', another file of the tokenizer says 'a'",
        ),
        ({"tokenizer": {"model": {"vocab": {}}, "added_tokens": [{"id": [1]}]}}, r"found None at \[1\]"),
        ({"tokenizer": {"model": {"vocab": {}}, "added_tokens": [3]}}, "added_tokens is no list of tokens"),
        ({"added_tokens": {"<a>": -1}}, "found '<a>' at -1"),
        ({"added_tokens": {"<a>": True}}, "found '<a>' at True"),
        ({"added_tokens": [1]}, r"added_tokens\.json holds a list"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder is no"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "found '<a>' at 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": "<a>"}}}, "added_tokens_decoder is no"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": {}}}}, "found None at 7"),
        (
            {"added_tokens": {"<a>": 7}, "tokenizer": {"model": {"vocab": {"w": 7}}}},
            "token 7 is '<a>', another file of the tokenizer says 'w'",
        ),
    ],
)
def test_what_is_no_tokenizer(tmp_path, files, message):
    with pytest.raises(InputError, match=message) as caught:
        read_tokens(write(tmp_path / "a", **files))
    assert "\n" not in str(caught.value)


def tokens_of(tmp_path, name, *added, words=WORDS):
    return read_tokens(word_tokenizer(tmp_path / name, words, *added))


def partial(**rows):
    """A tokenizer of which only the added tokens are known."""
    known = {row: token for token, row in rows.items()}
    return Tokens(None, known, {row: {"id": row, "content": token} for row, token in known.items()})


def match(*tokens, sizes):
    return match_tokens([f"{i}" for i in range(len(tokens))], tokens, sizes)


def test_one_vocabulary_moves_nothing(tmp_path):
    same = match(tokens_of(tmp_path, "a", "<a>"), tokens_of(tmp_path, "b", "<a>"), sizes=[7, 7])
    assert same.places == [list(range(7))] * 2
    assert not same.moved
    assert same.kept.folder == tmp_path / "b"
    assert same.more == {}


def test_another_token_at_the_same_row_gets_a_row_of_its_own(tmp_path):
    both = match(tokens_of(tmp_path, "a", "<a>", "<c>"), tokens_of(tmp_path, "b", "<b>", "<c>"), sizes=[8, 8])
    assert both.places == [list(range(8)), [0, 1, 2, 3, 4, 5, 8, 7]]
    assert both.rows == 9
    assert both.moved
    assert both.kept.folder == tmp_path / "a"
    assert {row: entry["content"] for row, entry in both.more.items()} == {8: "<b>"}


def test_the_larger_of_two_vocabularies_names_the_rows(tmp_path):
    larger = match(tokens_of(tmp_path, "a", "<a>", "<b>"), tokens_of(tmp_path, "b", "<a>"), sizes=[8, 7])
    assert larger.places == [list(range(8)), list(range(7))]
    assert not larger.moved
    assert larger.kept.folder == tmp_path / "a"


def test_rows_beyond_the_tokens_stay_where_they_are_unless_a_token_needs_them(tmp_path):
    padded = match(tokens_of(tmp_path, "a", "<a>"), tokens_of(tmp_path, "b"), sizes=[9, 9])
    assert padded.places == [list(range(9)), [0, 1, 2, 3, 4, 5, None, 7, 8]]
    assert not padded.moved
    both = match(tokens_of(tmp_path, "c", "<a>"), tokens_of(tmp_path, "d", "<b>"), sizes=[9, 9])
    assert both.places == [[0, 1, 2, 3, 4, 5, 6, None, 8], [0, 1, 2, 3, 4, 5, 7, None, 8]]
    assert both.rows == 9


def test_added_tokens_alone_are_matched(tmp_path):
    both = match(partial(a=6, c=7), partial(c=6), sizes=[8, 7])
    assert both.places == [list(range(8)), [0, 1, 2, 3, 4, 5, 7]]
    whole = match(partial(b=6), tokens_of(tmp_path, "whole", "a"), sizes=[7, 7])
    assert whole.places == [[0, 1, 2, 3, 4, 5, 7], list(range(7))]
    assert whole.kept.complete


@pytest.mark.parametrize("unknown", [None, partial(c=7)])
def test_a_row_that_nothing_names_beside_a_new_token(unknown):
    for tokens in ((partial(a=6), unknown), (unknown, partial(a=6))):
        with pytest.raises(InputError, match="is the new token '[ac]' in another adapter, and no tokenizer"):
            match(*tokens, sizes=[8, 8])


def test_tokenizers_of_different_vocabularies(tmp_path):
    other = write(tmp_path / "o", tokenizer={"model": {"vocab": {"w0": 0, "z": 1}}})
    with pytest.raises(InputError, match=r"row 1 is 'w1' in 0 and 'z' in 1: tokenizers of different vocabularies"):
        match(tokens_of(tmp_path, "a"), read_tokens(other), sizes=[6, 2])


def test_a_tokenizer_with_further_tokens_reads_them(tmp_path):
    both = match(tokens_of(tmp_path, "a", "<a>"), tokens_of(tmp_path, "b", "<b>", "<c>"), sizes=[7, 8])
    (tmp_path / "out").mkdir()
    for name, content in tokenizer_files(both.kept.folder, both.more).items():
        (tmp_path / "out" / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w3 <b> <a> w0 <c>")["input_ids"] == [3, 7, 6, 0, 8]
    assert len(tokenizer) == both.rows == 9
    for folder, own in (("a", "w1 <a>"), ("b", "<c> <b> w2")):
        theirs = AutoTokenizer.from_pretrained(tmp_path / folder).tokenize(own)
        assert tokenizer.tokenize(own) == theirs


def test_every_file_of_a_tokenizer_gets_the_further_tokens(tmp_path):
    decoder = {"6": {"content": "<a>", "special": False}}
    folder = write(tmp_path / "a", added_tokens={"<a>": 6}, tokenizer_config={"added_tokens_decoder": decoder, "x": 1})
    files = tokenizer_files(folder, {7: {"id": 7, "content": "<b>", "special": True}})
    assert json.loads(files["added_tokens.json"]) == {"<a>": 6, "<b>": 7}
    settings = json.loads(files["tokenizer_config.json"])
    assert settings == {"added_tokens_decoder": decoder | {"7": {"content": "<b>", "special": True}}, "x": 1}
    assert tokenizer_files(folder, {})["added_tokens.json"] == (folder / "added_tokens.json").read_bytes()


def test_the_vocabulary_of_a_base_on_this_machine(tmp_path):
    write(tmp_path / "plain", config={"vocab_size": 7})
    write(tmp_path / "nested", config={"text_config": {"vocab_size": 9}})
    write(tmp_path / "none", config={"hidden_size": 9})
    assert [
        vocabulary_size(base_config_file(str(tmp_path / name), None).parent) for name in ("plain", "nested", "none")
    ] == [
        7,
        9,
        0,
    ]
    for name in ("nobody/nothing", "/not/there/at/all", "a b/c"):
        assert base_config_file(name, None) is None
    assert vocabulary_size(None) == 0


NUMBERS = st.integers(-2, 9) | st.sampled_from([True, 1.0, 10**400])
WORDS_OR_ODD = st.sampled_from(["a", "b", "<c>", "", "7", "\ud800"]) | NUMBERS | st.none()
ENTRIES = st.fixed_dictionaries({}, optional={"id": WORDS_OR_ODD, "content": WORDS_OR_ODD, "special": st.booleans()})
TABLES = st.dictionaries(st.sampled_from(["a", "b", "3", "4", "<c>"]), WORDS_OR_ODD | ENTRIES, max_size=3)
LISTS = st.lists(ENTRIES | WORDS_OR_ODD | st.lists(WORDS_OR_ODD, max_size=2), max_size=3)
ANY = TABLES | LISTS | WORDS_OR_ODD
CONTENTS = {
    "tokenizer": st.fixed_dictionaries(
        {}, optional={"model": st.fixed_dictionaries({}, optional={"vocab": ANY}) | ANY, "added_tokens": ANY}
    ),
    "tokenizer_config": st.fixed_dictionaries({}, optional={"added_tokens_decoder": ANY}),
    "added_tokens": ANY,
}


@settings(max_examples=100, deadline=None)
@given(files=st.fixed_dictionaries({}, optional={name: content | ANY for name, content in CONTENTS.items()}))
def test_any_content_is_tokens_or_one_error(tmp_path_factory, files):
    folder = write(tmp_path_factory.mktemp("any"), **files)
    try:
        tokens = read_tokens(folder)
        both = match(tokens, tokens, sizes=[4, 4]) if tokens else None
    except InputError:
        return
    if tokens is None:
        assert not files
        return
    assert all(type(row) is int and row >= 0 and isinstance(token, str) for row, token in tokens.names.items())
    assert len(set(tokens.names.values())) == len(tokens.names)
    assert both.places == [list(range(4))] * 2

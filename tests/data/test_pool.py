"""The pool: its soft targets against the definition, its size, its file."""

import pytest
import torch
from helpers import refusal
from helpers.models import tiny_tokenizer

from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.pool import (
    BASE,
    SOFT_TOKENS,
    SOFT_WEIGHTS,
    Pool,
    PoolRow,
    in_turns,
    likeliest,
    soft_collate,
    targets,
    without_soft_targets,
)
from pm_hf.data.rows import Rows

ANSWERS = {" red": 0.5, " red1 blue": 0.25, " red1 gold": 0.15, " pale": 0.1}


def encoder(kind, max_length=24):
    return (Seq2SeqEncoder if kind == "t5" else CausalEncoder)(tiny_tokenizer(kind), max_length)


def row(completion, answers, prompt="Text: red1 red2", task="t", tokens=()):
    return PoolRow(task, completion, prompt, completion, answers, list(tokens))


def numbered(task, count):
    return [row(" red", {" red": 1.0}, f"Text: {at}", task) for at in range(count)]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5"])
@pytest.mark.parametrize("completion", ANSWERS)
def test_soft_targets_are_the_next_token_s_distribution_among_the_answers(kind, completion):
    made = encoder(kind)
    (example,) = Pool((row(completion, ANSWERS),)).examples(made)
    paths = {answer: made.completion("Text: red1 red2", answer) for answer in ANSWERS}
    said = paths[completion]
    assert targets(example) == said
    assert len(example["soft"]) == len(said)
    for at, target in enumerate(example["soft"]):
        together = {a: p for a, p in ANSWERS.items() if paths[a][:at] == said[:at]}
        for token in {paths[answer][at] for answer in together}:
            share = sum(p for a, p in together.items() if paths[a][at] == token) / sum(together.values())
            assert target.pop(token) == pytest.approx(share)
        assert not target


def test_soft_targets_of_free_text_are_the_stored_ones():
    made = encoder("llama")
    stored = [[[5, 6], [0.75, 0.25]], [[3], [1.0]]]
    (example,) = Pool((row(" red", {}, tokens=stored),)).examples(made)
    assert example["soft"] == [{5: 0.75, 6: 0.25}, {3: 1.0}]
    (longer,) = Pool((row(" red blue", {}, tokens=stored),)).examples(made)  # another tokenizer: its own token
    assert longer["soft"][2] == {targets(longer)[2]: 1.0}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_batch_has_the_soft_targets_of_all_rows_one_after_the_other(kind):
    made = encoder(kind)
    hard = made.examples(Rows(["Text: red3"], [" gold blue"]))[0]
    (soft,) = Pool((row(" red", ANSWERS),)).examples(made)
    batch = soft_collate(made.collate)([hard, soft, hard])
    flat = [{token: 1.0} for token in targets(hard)] + soft["soft"] + [{token: 1.0} for token in targets(hard)]
    assert batch[SOFT_TOKENS].shape == batch[SOFT_WEIGHTS].shape == (len(flat), max(map(len, flat)))
    for tokens, weights, expected in zip(batch[SOFT_TOKENS], batch[SOFT_WEIGHTS], flat, strict=True):
        found = {int(t): float(w) for t, w in zip(tokens, weights, strict=True) if w}
        assert found == pytest.approx(expected)
    assert torch.allclose(batch[SOFT_WEIGHTS].sum(1), torch.ones(len(flat)))
    assert without_soft_targets(batch).keys() == made.collate([hard]).keys()


def test_a_batch_of_plain_rows_has_none():
    made = encoder("llama")
    example = made.examples(Rows(["Text: red3"], [" gold"]))[0]
    assert soft_collate(made.collate)([example]).keys() == made.collate([example]).keys()


def test_shrinking_keeps_the_first_rows_of_every_task():
    pool = Pool((*numbered("a", 5), *numbered("b", 2)))
    assert [(r.task, r.prompt) for r in pool.shrunk(3).rows] == [
        *(("a", f"Text: {at}") for at in range(3)),
        *(("b", f"Text: {at}") for at in range(2)),
    ]
    assert pool.tasks == ["a", "b"]


def test_samples_of_the_base_stay_and_are_no_task():
    base = numbered(BASE, 4)
    pool = Pool((*base, *numbered("a", 5), *numbered("b", 2)))
    assert pool.tasks == ["a", "b"]
    assert pool.of_base == Pool(tuple(base))
    assert pool.shrunk(1) == Pool((*base, *numbered("a", 1), *numbered("b", 1)))
    assert pool.of_tasks == Pool((*numbered("a", 5), *numbered("b", 2)))
    assert Pool(tuple(base)).tasks == []


def test_turns_and_the_likeliest():
    assert in_turns([[1, 2, 3], [], [4], [5, 6]]) == [1, 4, 5, 2, 6, 3]
    assert in_turns([]) == []
    assert likeliest({"a": 0.1, "b": 0.3, "c": 0.0}) == {"b": 0.75, "a": 0.25}
    many = likeliest(dict.fromkeys(range(30), 1.0))
    assert list(many) == list(range(20))
    assert sum(many.values()) == pytest.approx(1)


def test_the_file_brings_every_row_back(tmp_path):
    odd = "Text: a\u2028b\x85c\nd \u00e9 \x0b"
    chat = [{"role": "user", "content": odd}]
    pool = Pool((row(" red", ANSWERS, odd), row("x", {}, chat, tokens=[[[3, 4], [0.25, 0.75]]])))
    pool.save(tmp_path / "pool.jsonl")
    assert Pool.load(tmp_path / "pool.jsonl") == pool
    Pool().save(tmp_path / "pool.jsonl")
    assert Pool.load(tmp_path / "pool.jsonl") == Pool()


@pytest.mark.parametrize("text", ["{\n", '{"task": "a"}\n', "[1]\n"])
def test_another_file_is_no_pool(tmp_path, text):
    (tmp_path / "pool.jsonl").write_text(text)
    assert "is no pool of written rows" in refusal(Pool.load, tmp_path / "pool.jsonl")
    assert "is no pool of written rows" in refusal(Pool.load, tmp_path / "none")

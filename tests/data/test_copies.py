"""Copies against the definitions, one pair of texts after the other."""

import random
from collections import Counter

import pytest

from pm_hf.data.copies import TrainingTexts


def shared_run(one, two):
    """Tokens of the longest run that stands in both."""
    starts = [(i, j) for i in range(len(one)) for j in range(len(two))]
    longest = 0
    for i, j in starts:
        size = 0
        while i + size < len(one) and j + size < len(two) and one[i + size] == two[j + size]:
            size += 1
        longest = max(longest, size)
    return longest


def is_copy(one, two):
    shared = sum(min(Counter(one)[token], Counter(two)[token]) for token in set(one))
    return shared_run(one, two) >= 8 or 10 * shared >= 8 * max(len(one), len(two))


@pytest.mark.parametrize("words", [3, 8, 30])
def test_copies_and_runs_are_those_of_every_pair(words):
    rng = random.Random(words)
    draw = lambda: tuple(rng.randrange(words) for _ in range(rng.randint(1, 12)))  # noqa: E731
    training = [draw() for _ in range(30)]
    edited = [text[:i] + (rng.randrange(words),) + text[i + 1 :] for text in training for i in (0, len(text) // 2)]
    texts, known = [*(draw() for _ in range(100)), *edited, *training], TrainingTexts(training)
    copied = [any(is_copy(text, other) for other in training) for text in texts]
    assert [known.copied(text) for text in texts] == copied
    assert True in copied
    assert words == 3 or False in copied
    runs = [max(shared_run(text, other) for other in training) for text in texts]
    assert [known.longest_run([text]) for text in texts] == runs
    assert known.longest_run(texts) == max(runs) > 8
    assert known.longest_run(texts[:20]) == max(runs[:20])


def test_eight_tokens_in_a_row_are_a_copy_in_a_text_of_any_length():
    training = TrainingTexts([range(20)])
    other = [100 + i for i in range(40)]
    assert training.copied([*other, *range(5, 13), *other])
    assert not training.copied([*other, *range(5, 12), *other])
    assert training.longest_run([[*other, *range(5, 12), *other]]) == 7


def test_without_training_texts_nothing_is_a_copy():
    assert not TrainingTexts([]).copied([1, 2])
    assert TrainingTexts([[]]).longest_run([[1, 2]]) == TrainingTexts([[1]]).longest_run([]) == 0

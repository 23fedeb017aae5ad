"""Texts that are collected from a writer: as many of each answer, whatever is dropped. The writers here are made up."""

import hashlib
from collections import Counter

import pytest
from helpers import refusal

from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task
from pm_hf.data.writing import Assignment, WritingForm
from pm_hf.runs.writers import ROUNDS, ROUNDS_WITHOUT, KeptWriter, check_kept, collect, written_again

ANSWERS = (" a", " b", " c")


class MadeUp:
    """Writes "ANSWER KEY NUMBER" for each prompt; keys: those it was called with, with the number of prompts."""

    def __init__(self):
        self.keys = []

    def write(self, prompts, key):
        self.keys.append((key, len(prompts)))
        answers = [prompt.removeprefix("Answer: ").removesuffix("\nText:") for prompt in prompts]
        return [f" {answer} {key} {at}\nmore" for at, answer in enumerate(answers)]


def assignment(count, answers=ANSWERS):
    rows = Rows([f"Q: {answer} {at}\nA:" for at in range(2) for answer in answers], list(answers) * 2)
    return Assignment("t", WritingForm.of(Task("t", answers, rows, rows, answers)), count, "0/1/t")


def test_every_answer_gets_as_many_texts_in_turns():
    found = collect(MadeUp(), assignment(8), lambda text: "kept")
    assert [answer for answer, _ in found.texts] == [" a", " b", " c", " a", " b", " c", " a", " b"]
    assert found.counts == {"kept": 8, "copies": 0, "doubles": 0, "empty": 0}
    assert all(text.startswith(answer.strip()) and "more" not in text for answer, text in found.texts)


def test_what_is_dropped_is_asked_for_again_and_an_answer_without_a_text_more_often():
    """Of b the first text that passes comes in the tenth round, of c none."""
    writer = MadeUp()
    fates = {"a": lambda number: "kept", "b": lambda number: "kept" if number == 9 else "copies"}

    def fate(text):
        answer, key, _ = text.split()
        return fates.get(answer, lambda number: "empty")(int(key.rpartition("/")[2]))

    found = collect(writer, assignment(6), fate)
    assert Counter(answer for answer, _ in found.texts) == {" a": 2, " b": 2}
    assert [size for _, size in writer.keys] == [6] + [4] * 9 + [2] * (ROUNDS_WITHOUT - 10)
    assert [key for key, _ in writer.keys] == [f"0/1/t/{number}" for number in range(ROUNDS_WITHOUT)]
    assert found.counts == {"kept": 4, "copies": 18, "doubles": 0, "empty": 2 * ROUNDS_WITHOUT}


def test_an_answer_with_a_text_is_asked_for_in_the_first_rounds_alone():
    writer = MadeUp()
    found = collect(writer, assignment(6), lambda text: "kept" if text.endswith(" 0") else "doubles")
    assert [size for _, size in writer.keys] == [6, 5, 4, 3, 2]
    assert len(writer.keys) == ROUNDS
    assert Counter(answer for answer, _ in found.texts) == {" a": 2, " b": 2, " c": 1}


def test_fewer_texts_than_answers_are_of_the_first_answers():
    found = collect(MadeUp(), assignment(2), lambda text: "kept")
    assert [answer for answer, _ in found.texts] == [" a", " b"]


def test_texts_are_known_again_by_their_digests():
    whole = collect(MadeUp(), assignment(6), lambda text: "kept")
    digests = tuple(hashlib.sha256(text.encode()).hexdigest()[:16] for _, text in whole.texts)
    kept = KeptWriter(assignment(6), (1,), 9, digests)
    assert written_again(MadeUp(), kept) == whole.texts
    lacking = KeptWriter(assignment(6), (1,), 9, kept.texts[1:])
    assert set(written_again(MadeUp(), lacking)) == set(whole.texts[1:])


@pytest.mark.parametrize(
    "content", ["", "[]", '{"assignment": 1}', '{"assignment": {"task": "t"}, "ends": [1], "longest": 3, "texts": []}']
)
def test_a_damaged_assignment_is_one_line(tmp_path, content):
    assert "holds no writer" in refusal(check_kept, tmp_path)
    (tmp_path / "00").mkdir()
    (tmp_path / "00" / "assignment.json").write_text(content)
    assert str(tmp_path / "00" / "assignment.json") in refusal(check_kept, tmp_path)

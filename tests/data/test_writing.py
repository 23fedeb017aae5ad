"""What a writer is asked for, and the rows that its texts make."""

from collections import Counter

import pytest
from helpers import refusal

from pm_hf.data.rows import Rows
from pm_hf.data.stream import Task
from pm_hf.data.writing import WritingForm, check_writable

TEMPLATED = Rows(["Say: a b\nAnswer:", "Say: a c d\nAnswer:", "Say: e\nAnswer:"], [" red", " blue", " red"])


def form(rows, own=()):
    return WritingForm.of(Task("t", own, rows, rows, own))


def chat(*contents, roles=("system", "user")):
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def test_the_text_is_what_differs_between_prompts():
    made = form(TEMPLATED, (" blue", " red"))
    assert (made.before, made.after) == ("Say: ", "\nAnswer:")
    assert made.texts(TEMPLATED) == ["a b", "a c d", "e"]
    trained = made.training(TEMPLATED)
    assert trained.inputs == ["Answer: red\nText:", "Answer: blue\nText:", "Answer: red\nText:"]
    assert trained.labels == [" a b", " a c d", " e"]
    assert made.text("  x y\nmore ") == "x y"
    assert made.row("x y") == ("Say: x y\nAnswer:", "")


@pytest.mark.parametrize(
    ("prompts", "before", "after"),
    [
        (["one two", "one twins"], "one ", ""),  # whole words
        (["who?", "why?"], "", ""),
        (["same text"] * 2, "same ", ""),  # something is left to be written
        (["a\n\nQ:", "b c\n\nQ:"], "", "\n\nQ:"),
        (["only"], "", ""),
    ],
)
def test_the_frame_is_in_whole_words(prompts, before, after):
    rows = Rows(prompts, [" x"] * len(prompts))
    made = form(rows, (" x",))
    assert (made.before, made.after) == (before, after)
    assert [made.row(text)[0] for text in made.texts(rows)] == prompts


def test_nothing_is_written_for_an_answer_that_the_task_has_no_row_of():
    assert form(TEMPLATED, (" blue", " green", " red")).answers == (" blue", " red")


def test_texts_with_line_breaks_are_written_with_them():
    rows = Rows(["a\nb\nAnswer:", "c\nAnswer:"], [" x", " y"])
    assert form(rows, (" x", " y")).text("d\ne") == "d\ne"


def test_free_text_has_no_answer_to_write_for():
    made = form(TEMPLATED)
    assert made.answers == ("",)
    assert made.training(TEMPLATED).inputs == ["Text:"] * 3
    assert made.row("x") == ("Say: x\nAnswer:", "")


def test_plain_text_is_the_completion():
    rows = Rows(["", ""], ["red red", "blue"])
    made = form(rows)
    assert made.training(rows) == Rows(["Text:", "Text:"], [" red red", " blue"])
    assert made.row("x y") == ("", "x y")


def test_a_chat_is_its_last_message_after_the_system_message_that_most_rows_have():
    rows = Rows(
        [chat("Be kind.", "Sort: a b"), chat("Be kind.", "Sort: c"), [{"role": "user", "content": "Sort: d"}]],
        ["x", "y", "x"],
    )
    made = form(rows, ("x", "y"))
    assert made.system == "Be kind."
    trained = made.training(rows)
    assert trained.inputs[0] == [{"role": "user", "content": "Answer: x\nText:"}]
    assert trained.labels == ["a b", "c", "d"]
    assert made.row("e")[0] == chat("Be kind.", "Sort: e")


@pytest.mark.parametrize(
    "prompt",
    [
        {"messages": chat("Be kind.", "a"), "tools": []},
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "text",
    ],
)
def test_chats_that_are_more_than_text_are_refused(prompt):
    rows = Rows([chat("Be kind.", "a"), prompt], ["x", "y"])
    assert "strategy.replay: generated: task 't' has chats" in refusal(check_writable, Task("t", (), rows, rows))
    check_writable(Task("t", (), rows.take([0]), rows))


def test_rows_without_a_text_are_no_example_for_the_writer():
    rows = Rows(["Q: a\nA:", "Q: \nA:"], [" x", " y"])
    assert form(rows, (" x", " y")).training(rows).labels == [" a"]


def test_rare_answers_are_shown_to_the_writer_as_often_as_the_mean_four_times_at_most():
    labels = [" a"] * 20 + [" b"] * 5 + [" c"] + [" d"] * 10
    rows = Rows([f"Q: {at} {label}\nA:" for at, label in enumerate(labels)], labels)
    trained = form(rows, (" a", " b", " c", " d")).training(rows)
    pairs = list(zip(trained.inputs, trained.labels, strict=True))
    assert pairs[: len(rows)] == list(
        zip(
            [f"Answer:{label}\nText:" for label in labels],
            [f" {at} {label}" for at, label in enumerate(labels)],
            strict=True,
        )
    )
    shown = Counter(source.removeprefix("Answer: ").removesuffix("\nText:") for source, _ in pairs)
    assert shown == {"a": 20, "b": 9, "c": 4, "d": 10}  # the mean is 9
    assert max(Counter(pairs).values()) == 4
    assert set(Counter(text for source, text in pairs if " b" in source).values()) == {1, 2}

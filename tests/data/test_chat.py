"""Conversations: all that messages hold reaches the chat template, or the row is refused by name."""

import json

import pytest
from datasets import Dataset
from helpers import refusal
from helpers.models import word_tokenizer

from pm_hf.data.chat import rendered
from pm_hf.data.encoders import check_encoding
from pm_hf.data.language import CausalEncoder, language_rows
from pm_hf.data.rows import Places, Rows
from pm_hf.data.tables import TextTable
from pm_hf.errors import InputError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"days": 2}}}
USER, FIRST = (
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
)
TOOL = {"role": "tool", "content": "no", "tool_call_id": "c1", "name": "weather"}
LAST = {"role": "assistant", "content": "It is dry.", "mood": "The tool said no."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
ALL = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% for key in m if key not in ('role', 'content') %}{{ key }}={{ m[key] | tojson }};{% endfor %}"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "[EOS]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{# tool_calls #}"
)


def read(**columns):
    return language_rows(TextTable(columns), "the file")


def tokenizer(template=ALL):
    made = word_tokenizer()
    made.chat_template = template
    return made


def written(rows, index, template=ALL):
    """(prompt, completion) of a row as the template writes them."""
    return CausalEncoder(tokenizer(template), 64).texts(rows.inputs[index], rows.labels[index])


def test_all_that_messages_hold_reaches_the_template():
    rows = read(messages=[[USER, FIRST, TOOL, LAST]], tools=[TOOLS])
    assert rows.labels == ["Let me look.", "It is dry."]
    (before, call), (long, end) = (written(rows, index) for index in range(2))
    assert before == f"[TOOLS]{json.dumps(TOOLS, separators=(', ', ': '))}[user]rain?[EOS]\n[assistant]"
    assert call == f"tool_calls={json.dumps([CALL])};Let me look.[EOS]"
    assert long == before + call + '\n[tool]tool_call_id="c1";name="weather";no[EOS]\n[assistant]'
    assert end == 'mood="The tool said no.";It is dry.[EOS]'
    assert [rows.places.name(i) for i in range(2)] == ["the file, row 0"] * 2


def test_tools_may_be_json_text_and_content_null_beside_calls():
    rows = read(messages=[[USER, FIRST | {"content": None}]], tools=[json.dumps(TOOLS)])
    assert json.loads(rows.labels[0]) == {"tool_calls": [CALL]}
    before, call = written(rows, 0)
    assert before.startswith(f"[TOOLS]{json.dumps(TOOLS)}")
    assert call == f"tool_calls={json.dumps([CALL])};[EOS]"
    without = read(messages=[[USER, {k: v for k, v in FIRST.items() if k != "content"}]], tools=[None])
    assert written(without, 0)[1] == call


def test_content_of_parts_reaches_a_template_that_reads_parts():
    parts = [{"type": "text", "text": "ra"}, {"type": "text", "text": "in?"}]
    rows = read(messages=[[USER | {"content": parts}, LAST | {"content": parts}]])
    assert rows.labels == ["rain?"]
    assert written(rows, 0) == ("[user]rain?[EOS]\n[assistant]", 'mood="The tool said no.";rain?[EOS]')
    for plain in ("{{ m['content'] }}", "{{ m['content'] | tojson }}", "{{ m['content'] | length }}"):
        with pytest.raises(InputError, match="does not read a content of parts; write it as one text"):
            written(rows, 0, "{% for m in messages %}" + plain + "{% endfor %}")


def test_prompt_and_completion_keep_what_their_messages_hold():
    rows = read(prompt=[[USER, FIRST, TOOL]], completion=[[LAST]], tools=[TOOLS])
    assert rows.inputs == [{"messages": [USER, FIRST, TOOL], "tools": TOOLS, "answer": {"mood": LAST["mood"]}}]
    same = read(messages=[[USER, FIRST, TOOL, LAST]], tools=[TOOLS])
    assert (rows.inputs[0], rows.labels[0]) == (same.inputs[1], same.labels[1])


def test_plain_messages_are_what_they_were():
    plain = [{"content": "rain?", "role": "user", "name": None}, {"role": "assistant", "content": "no"}]
    assert read(messages=[plain]).inputs == [[USER]]
    assert list(read(messages=[plain]).inputs[0][0]) == ["role", "content"]  # as digests of older runs have it


def test_keys_that_arrow_adds_are_no_part_of_a_message():
    data = Dataset.from_dict(
        {"messages": [[USER, FIRST], [USER, TOOL | {"role": "user"}, {"role": "assistant", "content": "no"}]]}
    )
    rows = language_rows(data, "the file")
    assert rows.inputs == [{"messages": [USER], "answer": {"tool_calls": [CALL]}}, [USER, TOOL | {"role": "user"}]]


WRONG = [
    ([USER, FIRST | {"content": 3}, "no"], 'message 2: expected {"role"'),
    ([{"from": "human", "value": "x"}], "message 0 has no role; found from, value"),
    ([USER, LAST | {"content": {"a": 1}}], "message 1: content must hold text, found {'a': 1}"),
    ([USER | {"content": [{"type": "image", "url": "x"}]}, LAST], "content must be text or parts"),
    ([USER | {"content": None}, LAST], "column messages must hold text, row 0 holds None in message 0"),
    ([USER, {"role": "assistant", "content": None}], "row 0 holds None in message 1"),
    ([USER, {"role": "assistant", "content": ""}], "column messages must hold text, row 0 holds ''"),
    ("[]", "must hold a list of messages, row 0 holds '[]'"),
]


@pytest.mark.parametrize(("messages", "message"), WRONG)
def test_what_is_no_message_is_refused_by_name(messages, message):
    said = refusal(read, messages=[messages])
    assert message in said
    assert "row 0" in said


@pytest.mark.parametrize("tools", ["{bad", "[" * 100_000, "7", ["x"], {"a": 1}])
def test_tools_that_are_none_are_refused_by_name(tools):
    with pytest.raises(InputError, match="the file: column tools, row 0"):
        read(messages=[[USER, LAST]], tools=[tools])


def test_keys_beside_a_prompt_of_text_are_refused_by_name():
    with pytest.raises(InputError, match="column completion, row 0 holds mood; column prompt must be"):
        read(prompt=["rain?"], completion=[[LAST]])
    assert read(prompt=["rain?"], completion=[[{"role": "assistant", "content": "no"}]]).labels == ["no"]


PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def test_template_without_a_place_for_calls_or_tools_is_refused():
    with pytest.raises(InputError, match="the chat template has no place for tool_calls"):
        rendered(tokenizer(PLAIN), [USER, FIRST])
    with pytest.raises(InputError, match="the chat template has no place for tools"):
        rendered(tokenizer(PLAIN), {"messages": [USER], "tools": TOOLS})
    assert rendered(tokenizer(PLAIN), [USER]) == "[user]rain?"


REFUSING = [
    ("{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}", "no system role"),
    ("{% if m.role == 'system' %}{{ m.content + 1 }}{% endif %}", "can only concatenate str"),
    ("{% if m.role == 'system' %}{{ m.content.nothing.more }}{% endif %}", "has no attribute 'nothing'"),
    ("{% if m.role == 'system' %}{{ 1 / 0 }}{% endif %}", "division by zero"),
]


@pytest.mark.parametrize(("template", "words"), REFUSING)
def test_every_row_is_put_through_the_template(template, words):
    template = "{% for m in messages %}" + template + "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    encoder = CausalEncoder(tokenizer(template), 64)
    talk = [USER, {"role": "assistant", "content": "no"}]
    good = read(messages=[talk] * 3)
    bad = language_rows(
        TextTable({"messages": [talk] * 2000 + [[{"role": "system", "content": "s"}, *talk]]}), "t.jsonl"
    )
    check_encoding(encoder, [good, Rows([], [])])
    for rows in (bad, bad.take(range(2000, 2001)), good.with_rows(bad)):
        said = refusal(check_encoding, encoder, [good, rows])
        assert said.startswith("t.jsonl, row 2000: the chat template refuses the conversation: ")
        assert words in said
        assert "change the row" in said


def test_template_that_writes_nothing_for_an_answer_is_refused():
    users = "{# mood #}{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    encoder = CausalEncoder(tokenizer(users), 64)
    with pytest.raises(
        InputError, match="the file, row 0: the chat template writes nothing for the assistant's message"
    ):
        check_encoding(encoder, [read(messages=[[USER, LAST]])])


def test_row_that_the_tokenizer_refuses_is_named():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pm_hf.data.encoders import TextEncoder

    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, "red": 2}))  # without a token for what is unknown
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]")
    texts = ["red"] * 1200 + ["zebra"]
    for encoder, rows in (
        (TextEncoder(known, 8), Rows(texts, ["x"] * 1201, Places.of("t.csv", 1201))),
        (CausalEncoder(known, 8), Rows(["red"] * 1201, texts, Places.of("t.csv", 1201))),
    ):
        check_encoding(encoder, [rows.take(range(1200))])
        with pytest.raises(InputError, match="t.csv, row 1200: the tokenizer refuses the text: .*change or remove"):
            check_encoding(encoder, [rows])
    with pytest.raises(InputError, match="t.csv, row 1: the text has no token; change or remove the row"):
        check_encoding(TextEncoder(known, 8), [Rows(["red", " "], ["x", "x"], Places.of("t.csv", 2))])
    check_encoding(CausalEncoder(known, 8), [Rows(["red", ""], ["red", "red"])])


def test_places_follow_the_rows():
    rows = Rows(list("abc"), list("xyz"), Places.of("one", 3)).take([2, 0])
    assert [rows.places.name(i) for i in range(2)] == ["one, row 2", "one, row 0"]
    both = rows.with_rows(Rows(["d"], ["w"], Places.of("two", 1)))
    assert [both.places.name(i) for i in range(3)] == ["one, row 2", "one, row 0", "two, row 0"]
    assert [both.take([2, 1]).places.name(i) for i in range(2)] == ["two, row 0", "one, row 0"]
    assert both.with_rows(Rows(["e"], ["v"])).places.name(1) == "row 1"


@pytest.mark.parametrize("key", ["weight", "reasoning_content", "name"])
def test_what_a_message_holds_besides_is_refused_by_a_template_without_a_place(key):
    plain = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", key: "w3"}]
    with pytest.raises(InputError, match=f"the chat template has no place for {key}; write it into the content"):
        rendered(tokenizer(plain), messages[:1], messages[1])
    assert "w3" in rendered(
        tokenizer("{% for m in messages %}{{ m | tojson }} {% endfor %}"), messages[:1], messages[1]
    )

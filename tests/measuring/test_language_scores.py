import math

import pytest
import torch
from helpers.models import LENGTH, WORDS, greedy, log_probabilities, mean_log_probability, tiny_model, tiny_tokenizer

from pm_hf.data.language import CausalEncoder, Seq2SeqEncoder
from pm_hf.data.pool import targets
from pm_hf.data.rows import Rows
from pm_hf.measuring.language_scores import MOST_GENERATED, LanguageScorer
from pm_hf.measuring.scores import cut_note

KINDS = ("llama", "qwen2", "gpt2", "t5")
ROWS = Rows(
    ["Text: red1 red2", "Text: dark4 pale3 gold1 red0", "Text: blue1", "Text: gold1 pale1 dark1"],
    [" gold", " blue1 blue2 blue3", " green", " pale0 pale1"],
)
ANSWERS = [" gold", " red1 red2 red3", " pale0 pale1"]


def setting(kind, max_length=24):
    """(model, encoder) of a kind."""
    made = Seq2SeqEncoder if kind == "t5" else CausalEncoder
    return tiny_model(kind), made(tiny_tokenizer(kind), max_length)


def spoken(model, encoder, longest=6):
    """ROWS' prompts completed by what the model itself says."""
    tokenizer = encoder.tokenizer
    said = [greedy(model, encoder.prompt(prompt), tokenizer.eos_token_id, longest) for prompt in ROWS.inputs]
    return Rows(ROWS.inputs, [tokenizer.decode(ids, skip_special_tokens=True) for ids in said])


@pytest.mark.parametrize("kind", KINDS)
def test_token_scores_are_those_of_single_examples(kind):
    model, encoder = setting(kind)
    pairs = [(encoder.prompt(p), encoder.completion(p, t)) for p, t in zip(ROWS.inputs, ROWS.labels, strict=True)]
    found = [log_probabilities(model, *pair) for pair in pairs]
    total = -float(torch.cat([values for values, _ in found]).double().sum())
    tokens, size = sum(len(answer) for _, answer in pairs), sum(len(text.encode()) for text in ROWS.labels)
    scores = LanguageScorer(model, encoder, 3).token_scores(ROWS)
    assert scores["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert scores["token_accuracy"] == sum(int(right.sum()) for _, right in found) / tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answers", [ANSWERS, [" red"]])
def test_likelihoods_are_those_of_one_forward_pass_for_each_prompt_and_answer(kind, answers):
    model, encoder = setting(kind)
    expected = [[mean_log_probability(model, encoder, p, a) for a in answers] for p in ROWS.inputs]
    found = LanguageScorer(model, encoder, 3).answer_likelihoods(ROWS, answers)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_match_is_that_of_decoding_step_by_step(kind):
    model, encoder = setting(kind)
    own = spoken(model, encoder)
    assert any(own.labels)
    whole = [i for i, text in enumerate(own.labels) if len(encoder.completion("", text)) <= 6]  # it ended by itself
    mixed = Rows(own.inputs, [f" {own.labels[0]} ", *(f"{text} red0" for text in own.labels[1:])])
    assert LanguageScorer(model, encoder, 2).exact_match(mixed.take(range(1, 4))) == 0.0
    if whole:
        assert LanguageScorer(model, encoder, 2).exact_match(own.take(whole)) == 1.0


def teach(model, batch, steps=60):
    """Train all of the model on one batch."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_is_said_and_chosen(kind):
    answers = [" gold", " blue1 blue2 blue3", " pale0 pale1", " gold"]
    model, encoder = setting(kind)
    teach(model, encoder.collate(encoder.examples(Rows(ROWS.inputs, answers))))
    model.generation_config.repetition_penalty = 5.0  # the checkpoint's own settings do not count
    rows, choices = Rows(ROWS.inputs, answers), sorted(set(answers))
    for ids, text in zip(map(encoder.prompt, rows.inputs), answers, strict=True):
        said = greedy(model, ids, encoder.tokenizer.eos_token_id, 12)
        assert encoder.tokenizer.decode(said).strip() == text.strip()
    scores = LanguageScorer(model, encoder).scores(rows, choices, choices)
    assert [scores[name] for name in ("exact_match", "class_incremental", "task_incremental")] == [1, 1, 1]
    wrong = LanguageScorer(model, encoder).scores(Rows(rows.inputs, [answers[1], *answers[1:]]), choices, choices)
    assert wrong["exact_match"] == wrong["class_incremental"] == 0.75


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_scores_do_not_depend_on_the_batch(kind, size):
    model, encoder = setting(kind)
    rows = Rows(ROWS.inputs, [ANSWERS[0], ANSWERS[1], ANSWERS[1], ANSWERS[2]])
    one = LanguageScorer(model, encoder, 3).scores(rows, ANSWERS, ANSWERS)
    assert LanguageScorer(model, encoder, size).scores(rows, ANSWERS, ANSWERS) == pytest.approx(one, rel=1e-5)
    order = [2, 0, 3, 1]
    again = LanguageScorer(model, encoder, size).scores(rows.take(order), ANSWERS, ANSWERS)
    assert again == pytest.approx(one, rel=1e-5)


def test_choice_is_among_the_task_s_own_answers_and_among_all_seen():
    model, encoder = setting("llama")
    found = LanguageScorer(model, encoder).answer_likelihoods(ROWS, ANSWERS)
    best = [ANSWERS[i] for i in found.argmax(1)]
    rows = Rows(ROWS.inputs, best)
    others = [answer for answer in ANSWERS if answer != best[0]]
    scores = LanguageScorer(model, encoder).scores(rows, ANSWERS, ANSWERS)
    assert scores["class_incremental"] == scores["task_incremental"] == 1
    second = [others[int(row[[ANSWERS.index(a) for a in others]].argmax())] for row in found]
    inside = LanguageScorer(model, encoder).scores(Rows(ROWS.inputs, second), others, ANSWERS)
    assert inside["task_incremental"] == 1
    expected = sum(a == b for a, b in zip(best, second, strict=True)) / len(best)
    assert inside["class_incremental"] == expected < 1


def test_mean_not_sum_decides_among_answers_of_different_length():
    model, encoder = setting("llama")
    prompt, text = encoder.prompt(ROWS.inputs[0]), " red1 red2 red3"
    values, _ = log_probabilities(model, prompt, encoder.completion("", text))
    found = LanguageScorer(model, encoder).answer_likelihoods(ROWS.take([0]), [text])
    assert float(found) == pytest.approx(float(values.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_chat_prompts_are_scored_by_their_template(kind):
    model, encoder = setting(kind, 64)
    prompts = [[{"role": "user", "content": text}] for text in ("red1", "red1 blue2 gold3")]
    rows = Rows(prompts, ["gold", "pale0 pale1"])
    expected = [[mean_log_probability(model, encoder, p, a) for a in rows.labels] for p in prompts]
    found = LanguageScorer(model, encoder).answer_likelihoods(rows, rows.labels)
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)
    assert 0 <= LanguageScorer(model, encoder).exact_match(rows) <= 1


def test_turn_that_ends_with_another_token_than_eos_is_ended_by_it():
    model, encoder = setting("llama", 32)
    encoder.tokenizer.chat_template = encoder.tokenizer.chat_template.replace("[EOS]", "[USER]")
    prompts = [[{"role": "user", "content": text}] for text in ("red1", "blue2")]
    rows = Rows(prompts, ["gold", "pale0 pale1 pale2"])
    assert encoder.completion(prompts[0], "gold")[-1] == encoder.tokenizer.convert_tokens_to_ids("[USER]")
    examples, babble = encoder.examples(rows), encoder.tokenizer.convert_tokens_to_ids("red4")
    for example in examples:  # what the model would go on to say
        example["input_ids"], example["labels"] = ([*example[key], babble] for key in ("input_ids", "labels"))
    teach(model, encoder.collate(examples))
    assert LanguageScorer(model, encoder).exact_match(rows) == 1.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_too_long_is_cut_as_in_training(kind):
    model, encoder = setting(kind, 6)
    long = Rows([f"Text: {' '.join(WORDS)}"] * 2, [" gold", f" {' '.join(WORDS[:9])}"])
    (short,) = encoder.examples(long.take([0]))
    prompt = [i for i, label in zip(short["input_ids"], short["labels"], strict=True) if label < 0]
    answer = encoder.completion("", " gold")
    found = LanguageScorer(model, encoder).answer_likelihoods(long.take([0]), [" gold"])
    assert float(found) == pytest.approx(float(log_probabilities(model, prompt, answer)[0].mean()), rel=1e-5)
    scores = LanguageScorer(model, encoder).scores(long, long.labels, long.labels)
    assert encoder.cut == 2
    assert all(math.isfinite(value) for value in scores.values())


def test_prompt_that_is_too_long_for_the_model_is_completed_from_its_right():
    model, encoder = setting("gpt2", LENGTH)
    rows = Rows([" ".join(WORDS * 3)], [" pale0 pale1"])
    assert len(encoder.prompt(rows.inputs[0])) > LENGTH
    teach(model, encoder.collate(encoder.examples(rows)))
    assert LanguageScorer(model, encoder).scores(rows, rows.labels, rows.labels)["exact_match"] == 1.0


def test_long_completions_and_plain_text_are_not_generated():
    model, encoder = setting("llama", 128)
    words = " ".join(WORDS * 3)
    short = " ".join(words.split()[: MOST_GENERATED - 1])
    assert "exact_match" in LanguageScorer(model, encoder).scores(Rows(["red1"], [short]), (), ())
    assert "exact_match" not in LanguageScorer(model, encoder).scores(Rows(["red1"], [f"{short} gold"]), (), ())
    plain = LanguageScorer(model, encoder).scores(Rows(["", ""], ["red1", "gold"]), (), ())
    assert list(plain) == ["loss", "perplexity", "bits_per_byte", "token_accuracy"]


def test_autocast_changes_little_and_the_mode_is_left():
    model, encoder = setting("llama")
    model.train()
    exact = LanguageScorer(model, encoder).scores(ROWS, ANSWERS, [*ANSWERS, *ROWS.labels])
    half = LanguageScorer(model, encoder, precision=torch.bfloat16).scores(ROWS, ANSWERS, [*ANSWERS, *ROWS.labels])
    assert model.training
    assert half["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert half["loss"] != exact["loss"]


def test_note_on_cut_rows():
    note = "2 of 5 training rows are longer than stream.max_length and were cut"
    assert cut_note(2, 5, "training rows") == note


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_answers_are_those_of_their_whole_texts_among_the_answers(kind):
    model, encoder = setting(kind)
    found = LanguageScorer(model, encoder, 3).answer_probabilities(ROWS, ANSWERS)
    for prompt, values in zip(ROWS.inputs, found.tolist(), strict=True):
        sums = [
            float(log_probabilities(model, encoder.prompt(prompt), encoder.completion(prompt, answer))[0].sum())
            for answer in ANSWERS
        ]
        total = sum(math.exp(value) for value in sums)
        assert values == pytest.approx([math.exp(value) / total for value in sums], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_rows_are_those_of_single_examples(kind):
    model, encoder = setting(kind)
    examples = encoder.examples(ROWS)
    expected = [
        -float(log_probabilities(model, encoder.prompt(p), encoder.completion(p, t))[0].mean())
        for p, t in zip(ROWS.inputs, ROWS.labels, strict=True)
    ]
    scorer = LanguageScorer(model, encoder, 3)
    assert scorer.row_losses(examples).tolist() == pytest.approx(expected, rel=1e-4)
    mixed = [
        example | {"soft": [{token: 0.75, 4: 0.25} for token in targets(example)]} if at % 2 else example
        for at, example in enumerate(examples)
    ]
    every = scorer.likeliest_tokens(examples, 10**6)
    for at, (example, loss) in enumerate(zip(examples, scorer.row_losses(mixed).tolist(), strict=True)):
        shares = [(0.75, 0.25) if at % 2 else (1.0, 0.0)] * len(targets(example))
        values = [
            -math.log(place[token]) * own - math.log(place[4]) * other
            for place, token, (own, other) in zip(every[at], targets(example), shares, strict=True)
        ]
        assert loss == pytest.approx(sum(values) / len(values), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_likeliest_tokens_are_those_of_single_examples(kind):
    model, encoder = setting(kind)
    found = LanguageScorer(model, encoder, 3).likeliest_tokens(encoder.examples(ROWS), 3)
    for prompt, text, places in zip(ROWS.inputs, ROWS.labels, found, strict=True):
        answer = encoder.completion(prompt, text)
        assert len(places) == len(answer)
        assert all(len(place) == 3 for place in places)
        values, best = log_probabilities(model, encoder.prompt(prompt), answer)
        for place, token, value, likeliest in zip(places, answer, values.tolist(), best.tolist(), strict=True):
            assert max(place, key=place.get) == token or not likeliest
            assert token not in place or place[token] == pytest.approx(math.exp(value), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_prompt_states_are_those_of_single_prompts(kind, size):
    model, encoder = setting(kind)
    part = model.get_encoder() if kind == "t5" else model
    with torch.no_grad():
        alone = [part(torch.tensor([encoder.prompt(p)]), output_hidden_states=True).hidden_states for p in ROWS.inputs]
    expected = torch.stack([torch.stack([layer[0, -1] for layer in states[1:]]) for states in alone], 1)
    found = LanguageScorer(model, encoder, size).prompt_states(ROWS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(LanguageScorer(model, encoder, size).prompt_states(ROWS, [2]), found[1:2])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_prompts_lose_what_is_longer_than_the_model_is_shown(kind):
    model, encoder = setting(kind, 8)
    rows = Rows([f"Text: {' '.join(WORDS[:9])}", "Text: red1"], [" gold", " gold"])
    kept = encoder.prompts(rows)
    assert [len(kept[0]), encoder.cut] == [8, 1]
    assert kept[1] == encoder.prompt(rows.inputs[1])
    whole = encoder.prompt(rows.inputs[0])
    assert kept[0][-1] == whole[-1]  # the end decides
    assert LanguageScorer(model, encoder).prompt_states(rows).shape[1:] == (2, model.config.hidden_size)

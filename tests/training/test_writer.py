"""The writer: what it writes, and that it writes the same again."""

from collections import Counter

import pytest
import torch
from helpers.models import KINDS, OLD_NAME
from helpers.streams import language_settings
from transformers import TopPLogitsWarper

import pm_hf.training.writer
from pm_hf.adapters.folder import save_adapter
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.data.writing import WritingForm
from pm_hf.models.loading import load_base
from pm_hf.training.writer import Nucleus, Writer, load_writer, train_writer

pytestmark = pytest.mark.filterwarnings(OLD_NAME)


@pytest.fixture(scope="module", params=["llama", "t5"])
def trained(request, language_data, tmp_path_factory):
    """(writer of a tiny model that has learned its task, the form, the folder of its trainer)."""
    folder = tmp_path_factory.mktemp(request.param)
    config = load_config(language_settings(language_data, folder, request.param, "average"))
    encoder, task = make_encoder(config), load_stream(config).tasks[0]
    form = WritingForm.of(task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pm_hf.training.writer.WRITER_TRAINING, "learning_rate", 3e-2)
        patch.setitem(pm_hf.training.writer.WRITER_TRAINING, "num_train_epochs", 20)
        writer, _ = train_writer(config, form.training(task.train), encoder, 0, folder / "writer")
    return writer, form, folder / "writer"


def test_texts_are_like_those_of_the_answer_asked_for(trained):
    writer, form, _ = trained
    for answer, colour, other in ((" red", "red", "blue"), (" blue", "blue", "red")):
        said = " ".join(form.text(text) for text in writer.write([form.source(answer)] * 40, "key")).split()
        kinds = Counter(kind for word in said for kind in KINDS if word.startswith(kind))
        assert kinds[colour] > max(0.35 * len(said), 1.5 * kinds[other])


def test_the_same_key_gives_the_same_texts_and_leaves_the_random_state_alone(trained):
    writer, form, _ = trained
    prompts = [form.source(answer) for answer in (" red", " blue")] * 20  # two batches
    state = torch.get_rng_state()
    first = writer.write(prompts, "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert writer.write(prompts, "a") == first
    assert writer.write(prompts, "b") != first
    assert len(set(first)) > 10


def test_no_text_is_longer_than_the_longest_training_text(trained):
    writer, form, _ = trained
    assert writer.longest <= 6  # four words, the end, and T5's
    for text in writer.write([form.source(" red")] * 20, "key"):
        assert len(text.split()) <= writer.longest


@pytest.mark.parametrize("size", [5, 700, 3000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_the_nucleus_is_that_of_transformers(size, spread):
    torch.manual_seed(size)
    logits = spread * torch.randn(20, size)
    expected = TopPLogitsWarper(0.95)(None, logits)
    assert torch.equal(Nucleus(0.95)(None, logits), expected)
    assert bool((expected == -torch.inf).any()) == (size > 5 or spread > 0.01)


def test_texts_that_go_on_without_the_ended_ones_are_those_of_one_generation(trained, monkeypatch):
    """Without chance: what the model says greedily, written all at once and one prompt at a time by transformers."""
    writer, form, _ = trained
    plain, calls = writer._settings, []

    def greedy(longest):
        calls.append(longest)
        settings = plain(longest)
        settings.do_sample = False
        return settings

    monkeypatch.setattr(writer, "_settings", greedy)
    prompts = [form.source(f" {a} {b}") for a in KINDS for b in ("", *KINDS)]
    texts = writer.write(prompts, "key")
    assert len(calls) > 2 or writer.model.config.is_encoder_decoder  # two batches, and those that went on
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([writer.encoder.prompt(prompt)])
        mask, settings = torch.ones_like(ids), greedy(writer.longest)
        said = writer.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings).sequences
        said = said[0] if writer.model.config.is_encoder_decoder else said[0, ids.shape[1] :]
        assert text == writer.encoder.tokenizer.decode(said, skip_special_tokens=True)
    assert len({len(text.split()) for text in texts}) > 1


def test_it_draws_with_temperature_1_and_top_p(trained, monkeypatch):
    writer, form, _ = trained
    generate, seen = writer.model.generate, []

    def watched(**inputs):
        seen.append((inputs["generation_config"], *inputs["logits_processor"]))
        return generate(**inputs)

    monkeypatch.setattr(writer.model, "generate", watched)
    writer.write([form.source(" red")] * 33, "key")
    assert len(seen) >= 2
    settings, nucleus = seen[0]
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 1.0, 1.0, 0)
    assert nucleus.share == 0.95


def test_nothing_of_its_training_is_left(trained):
    _, _, folder = trained
    assert not folder.exists() or not list(folder.iterdir())


def test_beside_quantized_weights_it_stays_an_adapter_and_is_loaded_as_it_was(language_data, tmp_path):
    """Folded into 4 bits it would be rounded to their steps, and write other texts than it learned."""
    changes = {"model__quantization": "nf4"}
    config = load_config(language_settings(language_data, tmp_path, "llama", "average", **changes))
    encoder, task = make_encoder(config), load_stream(config).tasks[0]
    form = WritingForm.of(task)
    writer, adapter = train_writer(config, form.training(task.train), encoder, 0, tmp_path / "writer")
    base, _ = load_base(config.model, (), 0, "causal-lm")
    packed = dict(base.named_parameters())
    for name, parameter in writer.model.named_parameters():
        plain = name.replace(".base_layer", "")
        assert ".lora_" in name or torch.equal(parameter, packed[plain]), name
    save_adapter(tmp_path / "kept", adapter.config, adapter.factors, {}, {})
    again = load_writer(
        tmp_path / "kept", config, encoder, adapter.ends, adapter.longest, torch.device("cpu"), torch.bfloat16
    )
    prompts = [form.source(answer) for answer in (" red", " blue")] * 4
    assert again.write(prompts, "key") == writer.write(prompts, "key")
    assert Writer(base, encoder, adapter.ends, adapter.longest).write(prompts, "key") != writer.write(prompts, "key")

"""The writer: what it writes, and that it writes the same again."""

from collections import Counter

import pytest
import torch
from helpers.models import KINDS, OLD_NAME
from helpers.streams import language_settings

import pm_hf.training.writer
from pm_hf.config.loading import load_config
from pm_hf.data.encoders import make_encoder
from pm_hf.data.stream import load_stream
from pm_hf.data.writing import WritingForm
from pm_hf.training.writer import train_writer

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
        writer = train_writer(config, form.training(task.train), encoder, 0, folder / "writer")
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


def test_it_draws_with_temperature_1_and_top_p(trained, monkeypatch):
    writer, form, _ = trained
    generate, seen = writer.model.generate, []

    def watched(**inputs):
        seen.append(inputs["generation_config"])
        return generate(**inputs)

    monkeypatch.setattr(writer.model, "generate", watched)
    writer.write([form.source(" red")] * 33, "key")
    assert len(seen) == 2
    settings = seen[0]
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 1.0, 0.95, 0)


def test_nothing_of_its_training_is_left(trained):
    _, _, folder = trained
    assert not folder.exists() or not list(folder.iterdir())

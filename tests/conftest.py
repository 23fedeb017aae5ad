"""Tiny models and data, built in-process and offline."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.environ.get("PM_HF_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare with references on the CPU, bit by bit

import functools
import gc
from pathlib import Path

import pytest
import torch
from helpers.streams import settings, write_base, write_data, write_language_data

from pm_hf.runs.learner import learn

GPU = torch.cuda.is_available()  # only with PM_HF_TEST_GPU, for tests/test_gpu.py


@pytest.fixture(scope="module", autouse=True)
def _frozen_heap():
    """What imports left is never garbage: a Trainer collects several times a run, which takes 0.1 s of it each. Anew in
    every module, as tests import on."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny models are faster and repeatable on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of a BERT encoder with 2 layers of width 32, without a head, and its word tokenizer."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def stream_data(tmp_path_factory):
    """stream_data(per_class) -> a folder with train.csv and test.csv of all classes, written once; never changed."""
    return functools.cache(lambda per_class: write_data(tmp_path_factory.mktemp("data"), per_class=per_class))


@pytest.fixture(scope="session")
def finished_run(tiny_base, stream_data, tmp_path_factory):
    """finished_run(per_class, **settings) -> the output folder of a run that nothing disturbed, trained once for its
    settings; nobody changes it."""

    @functools.cache
    def train(per_class, **changes):
        folder = tmp_path_factory.mktemp("finished") / "run"
        learn(settings(tiny_base, stream_data(per_class), folder, **changes))
        return folder

    return train


@pytest.fixture
def stream_config(tiny_base, tmp_path) -> dict:
    """Settings of a class-incremental stream of 3 tasks with 2 classes each; a task takes about a second."""
    return settings(tiny_base, write_data(tmp_path), tmp_path / "run", stream__class_groups=3)


@pytest.fixture(scope="session")
def language_data(tmp_path_factory) -> Path:
    """Texts with their kind, plain texts by domain, a held-out text, conversations, tiny language models."""
    return write_language_data(tmp_path_factory.mktemp("language"))

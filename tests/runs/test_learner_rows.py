"""Rows that cannot be learned stop a run before anything is made."""

import json

import pytest
from helpers import refusal
from helpers.models import OLD_NAME
from helpers.streams import LANGUAGE_TASKS
from helpers.streams import language_settings as settings

from pm_hf.runs.learner import learn


@pytest.mark.filterwarnings(OLD_NAME)
def test_row_that_the_template_refuses_stops_the_run_before_anything_is_made(language_data, tmp_path):
    tasks = [{"name": n, "train": f"{n}-chat-train.jsonl", "test": f"{n}-chat-test.jsonl"} for n in LANGUAGE_TASKS]
    rows = (language_data / "second-chat-train.jsonl").read_text().splitlines()
    said = {"role": "assistant", "content": "gold", "tool_calls": [{}]}
    odd = {"messages": [{"role": "user", "content": "red1"}, said]}
    (tmp_path / "odd.jsonl").write_text("\n".join([*rows, json.dumps(odd)]))
    tasks[1]["train"] = str(tmp_path / "odd.jsonl")
    changes = {"stream__prompt_template": None, "stream__max_length": 64, "stream__tasks": tasks}
    config = settings(language_data, tmp_path / "run", "qwen2", **changes)
    assert f"odd.jsonl, row {len(rows)}: the chat template" in refusal(learn, config)
    assert not (tmp_path / "run").exists()

"""The card beside a merge."""

import ast
import re

import pytest
from helpers.adapter_folders import CONFIG, HEAD, head, write_folder
from huggingface_hub import ModelCard

from pm_hf.cli import main

LABELS = {HEAD: ["x", "y"]}


def pair(folder, base="owner/base", **more):
    """Two adapters in folders that nobody else should hear of."""
    config = {"base_model_name_or_path": base} | more.pop("config", {})
    return [write_folder(folder / "secret" / name, seed=i, config=config, **more) for i, name in enumerate("ab")]


def merged(folder, adapters, *arguments):
    output = folder / "both"
    assert main(["merge", *map(str, adapters), "--output", str(output), "--method", "average", *arguments]) == 0
    return output


def test_card_says_what_was_merged_and_how(tmp_path):
    output = merged(tmp_path, pair(tmp_path), "--weights", "0.3", "0.7", "--max-rank", "2")
    card = ModelCard.load(output / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/base", "adapter")
    assert (card.data.library_name, card.data.tags) == ("peft", ["lora", "merge", "pm-hf"])
    assert "| secret/a | 0.300 |\n| secret/b | 0.700 |" in card.text
    error = re.search(r"weight's update: (\S+) by truncation", card.text)[1]
    assert 0 < float(error) < 1
    assert str(tmp_path) not in str(card)
    assert (output / CONFIG).is_file()


@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None])
def test_code_loads_it_and_predicts_where_the_task_is_known(task, tmp_path):
    saved = {"saved": head(2, 0), "labels": LABELS} if task == "SEQ_CLS" else {}
    config = {"task_type": task, "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers"}}
    output = merged(tmp_path, pair(tmp_path, str(tmp_path / "base"), config=config, **saved))
    text = (output / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    tree = ast.parse(code)
    named = {n.name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for n in node.names}
    assert {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} >= named
    assert ("print(" in code) == (task in ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"))
    assert ("BertModel" in code) == (task in ("FEATURE_EXTRACTION", None))
    assert "base_model:" not in text  # a folder of this machine
    assert str(tmp_path) not in text


def test_own_card_is_replaced_and_one_by_hand_stays(tmp_path, capsys):
    adapters = pair(tmp_path)
    output = merged(tmp_path, adapters)
    (output / ".README.md.tmp-1-0").mkdir()  # of a killed write
    merged(tmp_path, adapters[:1], "--overwrite")
    assert "merged of one adapter" in (output / "README.md").read_text()
    assert not list(output.glob(".README*"))
    (output / "README.md").write_text("by hand")
    capsys.readouterr()
    merged(tmp_path, adapters, "--overwrite")
    assert (output / "README.md").read_text() == "by hand"
    assert "README.md was written by hand and is kept" in capsys.readouterr().out

"""The model card: what the Hub reads of it, what a person reads, and what must not be in it."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.models import OLD_NAME, TARGETS, save_vit, tiny_folder, tiny_model
from helpers.records import TASKS, finished_run
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import ViTForImageClassification

from pm_hf.reports.card import loading_imports, loading_lines, model_card, prediction_imports, prediction_lines
from pm_hf.reports.release import read_finished_run

LOADED = {
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}


def card_of(folder, base="owner/base"):
    return ModelCard(model_card(read_finished_run(folder, base), "me/kept"))


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


def code_of(card):
    return card.text.split("```python\n")[1].split("```")[0]


def test_metadata_is_what_the_hub_needs_to_show_and_find_the_adapter(run):
    data = card_of(run).data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("peft", "owner/base", "adapter")
    assert data.pipeline_tag == "text-classification"
    assert data.model_name == "kept"
    assert "continual-learning" in data.tags


def test_model_index_holds_each_tasks_last_score_and_the_averages(run):
    found = card_of(run).data.eval_results
    scores = {r.dataset_name: r.metric_value for r in found if r.dataset_config != "all"}
    assert scores == {"news": 0.7, "a|b <i>": 0.8}
    assert {r.metric_type for r in found if r.dataset_config != "all"} == {"accuracy"}
    kinds = {r.metric_name.split(":")[0]: r.metric_type for r in found if r.dataset_config == "all"}
    assert kinds == {
        "ACC": "accuracy",
        "AAA": "average_incremental_accuracy",
        "BWT": "backward_transfer",  # which may be negative, and is no accuracy
        "forgetting": "forgetting",
    }
    averages = {r.metric_name.split(":")[0]: r.metric_value for r in found if r.dataset_config == "all"}
    expected = {"ACC": 0.75, "AAA": (0.9 + 0.75) / 2, "BWT": -0.2, "forgetting": 0.2}
    assert averages == pytest.approx(expected)


def test_table_has_every_score_and_odd_names_stay_in_their_cell(run):
    text = card_of(run).text
    assert "| task | after 1 | after 2 |\n| --- | ---: | ---: |\n| news | 0.900 | 0.700 |" in text
    assert "| a\\|b \\<i\\> | – | 0.800 |" in text
    assert "| 2 | 0.400 | 0.500 |" in text
    assert "| ACC: mean over all tasks at the end | 0.750 |" in text


def test_notes_of_the_merge_stand_under_the_loading_lines(run):
    assert "ranks from" not in card_of(run).text
    record = {"tasks": 2, "inputs": [], "notes": ["the modules have ranks from 2 to 4 (rank_pattern)"]}
    for folder in run.rglob("merged"):
        (folder / "merge_report.json").write_text(json.dumps(record))
    assert "```\n\nthe modules have ranks from 2 to 4 (rank\\_pattern)" in card_of(run).text


def test_table_of_many_tasks_has_the_first_and_the_last_score_only(run):
    path, count = run / "report.json", 20
    report = json.loads(path.read_text())
    R = [[0.5 + i / 100 if i <= t else None for i in range(count)] for t in range(count)]
    for name in ("coefficients", "tasks"):
        report[name] = [None] * count if name == "coefficients" else [f"t{i}" for i in range(count)]
    read = read_finished_run(run, "owner/base")
    changes = {"tasks": report["tasks"], "alphas": report["coefficients"], "matrices": {report["metric"]: R}}
    changes["records"] = [None] * count
    text = model_card(replace(read, report=replace(read.report, **changes)), "me/kept")
    assert "| task | after learning it | at the end |" in text
    assert "| t19 | 0.690 | 0.690 |" in text


@pytest.mark.parametrize("kind", LOADED)
def test_lines_load_the_class_of_the_streams_kind(tmp_path, kind):
    language = kind.endswith("lm")
    folder = finished_run(tmp_path / "run", kind, "bits_per_byte" if language else "class_incremental")
    code = code_of(card_of(folder))
    ast.parse(code)
    imports, lines, predicted = code.strip().split("\n\n")[-3:]
    assert predicted.splitlines()[-1].startswith("print(")
    assert len(lines.splitlines()) == 3
    assert f'base = {LOADED[kind]}.from_pretrained("owner/base"' in lines
    assert LOADED[kind] in imports
    assert 'dtype="float32"' in lines
    assert lines.endswith('model = PeftModel.from_pretrained(base, "me/kept")')
    assert ('hf_hub_download("me/kept", "labels.json")' in lines) != language
    assert ('AutoTokenizer.from_pretrained("owner/base")' in lines) == language


@pytest.mark.parametrize("predicts", [False, True])
@pytest.mark.parametrize("kind", LOADED)
def test_imports_name_exactly_what_the_lines_use(kind, predicts):
    head = None if kind.endswith("lm") else "classifier"
    for hub in (True, False):
        lines, imports = loading_lines("a/b", "c/d", head, kind, on_hub=hub), loading_imports(kind, on_hub=hub)
        if predicts:
            lines, imports = f"{lines}\n{prediction_lines('a/b', 'c/d', kind)}", prediction_imports(kind, on_hub=hub)
        tree = ast.parse(imports + "\n" + lines)
        imported = {
            name.name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names
        }
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        made = {"labels", "base", "model", "tokenizer", "open", "len", "dict", "enumerate"}
        made |= {"processor", "inputs", "answer", "print", "int"}
        assert used - made == imported


@pytest.mark.filterwarnings(OLD_NAME)
@pytest.mark.parametrize("kind", ["image-classification", "causal-lm", "seq2seq-lm"])
def test_lines_of_every_kind_load_the_adapter_as_it_was_saved(tmp_path, kind):
    base, targets, saved = tmp_path / "base", ["k_proj"], None
    if kind == "image-classification":
        model, saved = ViTForImageClassification.from_pretrained(save_vit(base), num_labels=3), ["classifier"]
    else:
        name = "llama" if kind == "causal-lm" else "t5"
        tiny_folder(name, base)
        model, targets = tiny_model(name), TARGETS[name]
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "labels.json").write_text('{"classifier": ["a", "b", "c"]}')
    lines = loading_lines(str(base), tmp_path / "merged", saved and "classifier", kind, dtype="float32")
    lines = lines.replace("json.load(open(", "json.loads(read(")
    place = {"read": lambda path: Path(path).read_text()}
    exec(loading_imports(kind) + "\n" + lines, place)
    found, expected = (dict(get_peft_model_state_dict(m)) for m in (place["model"], model))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert type(place["base"]) is type(model.get_base_model())


def test_card_of_a_language_model_reports_bits_per_byte_as_such(tmp_path):
    folder = finished_run(tmp_path / "run", "causal-lm", "bits_per_byte")
    data = card_of(folder).data
    assert data.pipeline_tag == "text-generation"
    kinds = {r.metric_type for r in data.eval_results}
    others = {"average_incremental_bits_per_byte", "backward_transfer", "forgetting"}
    assert kinds == {"bits_per_byte", *others}


def test_a_quantized_base_is_told_and_the_code_loads_the_published_one(tmp_path):
    model = {"base": "owner/base", "quantization": "nf4"}
    card = card_of(finished_run(tmp_path / "run", "causal-lm", "bits_per_byte", model=model))
    assert "trained and scored on this base model quantized to nf4 by bitsandbytes" in " ".join(card.text.split())
    assert "quantization" not in code_of(card)


def test_making_has_method_versions_and_settings_without_places(run):
    card = card_of(run)
    text = str(card)
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["model"] == {"base": "owner/base", "dtype": "float32", "trust_remote_code": False}
    assert settings["stream"]["train"] == "train.csv"
    assert settings["stream"]["test"] == "test.csv"
    assert not {"output_dir", "data_dir"} & settings.keys()
    assert "Method `pm`, seed 3, class-incremental, 12 s." in text
    assert "torch 2" in text
    assert str(run.parent) not in text
    assert "- rows of run/task-00-news cut" in text


def test_pictures_of_the_run_are_shown_and_others_not_made_up(run):
    assert "## Plots" not in card_of(run).text
    (run / "plots").mkdir()
    for name in ("accuracy.png", "accuracy.svg", "plots/merge_line.svg"):
        (run / name).write_bytes(b"picture")
    for name in ("forgetting", "time-of-each-task", "score-after-each-task", "matrix-1"):
        (run / "plots" / f"{name}.svg").write_text("<svg/>")
    text = card_of(run).text
    shown = re.findall(r"^!\[(.+)\]\(plots/(.+)\)\n\n\*(.+)\*$", text, flags=re.M)
    assert len(shown) == text.count("](plots/") == 6
    assert all(alt == caption and caption.endswith(".") for alt, _, caption in shown)
    names = ["score-after-each-task.svg", "matrix-1.svg", "forgetting.svg", "accuracy.png", "merge_line.svg"]
    assert [name for _, name, _ in shown][:3] == names[:3]
    assert {name for _, name, _ in shown} == {*names, "time-of-each-task.svg"}


def test_use_and_licence_say_what_is_known_and_no_more(run, tmp_path):
    card = card_of(run)
    assert (card.data.license, card.data.language) == (None, None)
    assert "It gives a text one of 4 classes: `x`, `y`, `z`, `w`." in card.text
    assert "The adapter's licence is not stated." in card.text
    told = ModelCard(model_card(read_finished_run(run, "owner/base"), "me/kept", license="mit", language="en"))
    assert (told.data.license, told.data.language) == ("mit", "en")
    assert "The adapter's licence is mit." in told.text
    template, rows = "{text} ({task}):", {"tasks": [{"name": name, "train": "a.csv"} for name in TASKS]}
    folder = finished_run(
        tmp_path / "asked",
        "causal-lm",
        "exact_match",
        stream={"kind": "causal-lm", "prompt_template": template, **rows},
    )
    assert 'tokenizer("text (news):", return_tensors="pt")' in code_of(card_of(folder))
    assert "It completes prompts as the 2 tasks' training rows do." in card_of(folder).text


def test_data_sets_of_the_hub_are_named_and_local_ones_not(tmp_path):
    sources = [{"name": TASKS[0], "dataset": "owner/data"}, {"name": TASKS[1], "dataset": str(tmp_path)}]
    folder = finished_run(tmp_path / "run", stream={"tasks": sources})
    assert card_of(folder).data.datasets == ["owner/data"]
    assert str(tmp_path) not in str(card_of(folder))


def test_every_task_has_its_subfolder_in_the_list(run):
    text = card_of(run).text
    assert "`tasks/task-00-news`" in text
    assert "`tasks/task-01-a-b--i-`" in text

"""The command line: exit codes, one line on stderr for bad input, and what merge, inspect and methods print."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.adapter_folders import HEAD, SHAPES, WEIGHTS, assert_same, curvature_sums, dense, head, tree, write_folder
from safetensors.torch import load_file

import pm_hf.adapters.merge
from pm_hf.adapters.inspection import describe, relate
from pm_hf.cli import SHELLS, main
from pm_hf.merging.methods import METHODS


@pytest.fixture
def pair(tmp_path):
    """Names of a running merge and a task adapter."""
    return str(write_folder(tmp_path / "merged", rank=3, seed=1)), str(write_folder(tmp_path / "task", seed=2))


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of one command, also where argparse exits."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_merge_folds_with_a_coefficient(pair, tmp_path, capsys):
    out = tmp_path / "out"
    code, printed, errors = run(capsys, "merge", pair[1], "--into", pair[0], "--output", out, "--coefficient", 0.3)
    assert (code, errors) == (0, "")
    merged, task = dense(pair[0]), dense(pair[1])
    assert_same(dense(out), {name: merged[name] + 0.3 * task[name] for name in SHAPES})
    assert "coefficient 0.300000 (raw 0.300000, 1/t 0.500000)" in printed
    assert all(f"{name}: rank 3+2 -> 5, relative error 0.00e+00" in printed for name in SHAPES)
    assert printed.splitlines()[-1] == f"written: {out}"


def test_merge_with_a_curvature_file_and_truncation(pair, tmp_path, capsys):
    merged, task = dense(pair[0]), dense(pair[1])
    sums, H = curvature_sums("fisher", [merged, task], [{}, merged])
    sums.save(tmp_path / "c.safetensors")
    limits = ["--max-rank", 4, "--dtype", "bfloat16", "--freedom", "global", "--energy", 1]
    code, printed, _ = run(
        capsys,
        *("merge", pair[1], "--into", pair[0], "--output", tmp_path / "out"),
        *("--curvature", tmp_path / "c.safetensors", "--option", "on_zero_curvature=average", *limits),
    )
    assert code == 0
    past, current = (sum(float((h[name] * task[name].square()).sum()) for name in SHAPES) for h in H)
    assert f"coefficient {current / (past + current):.6f} (raw" in printed
    stored = load_file(tmp_path / "out" / WEIGHTS).values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}
    assert {min(tensor.shape) for tensor in stored} == {4}


def test_merge_of_several_with_weights(pair, tmp_path, capsys):
    out = tmp_path / "out"
    code, printed, _ = run(capsys, "merge", *pair, "--output", out, "--method", "average", "--weights", 0.6, 0.4)
    assert code == 0
    assert "coefficient" not in printed
    left, right = dense(pair[0]), dense(pair[1])
    assert_same(dense(out), {name: 0.6 * left[name] + 0.4 * right[name] for name in SHAPES})


def test_merge_overwrites_only_when_told(pair, tmp_path, capsys):
    fold = ["merge", pair[1], "--into", pair[0], "--output", pair[0], "--coefficient", 0.3]
    before = tree(tmp_path)
    code, _, errors = run(capsys, *fold)
    assert code == 2
    assert "merged exists; choose another folder, or overwrite=True (--overwrite)" in errors
    assert tree(tmp_path) == before
    assert run(capsys, *fold, "--overwrite")[0] == 0
    assert tree(tmp_path) != before


@pytest.mark.parametrize("exists", [True, False])
def test_dry_run_prints_the_report_and_writes_nothing(pair, tmp_path, capsys, exists):
    output, before = pair[0] if exists else tmp_path / "deep" / "out", tree(tmp_path)
    fold = ["merge", pair[1], "--into", pair[0], "--output", output, "--coefficient", 0.3, "--dry-run"]
    code, printed, _ = run(capsys, *fold)
    assert code == 0
    assert "layers.0.q: rank 3+2 -> 5" in printed
    assert printed.splitlines()[-1] == "dry run: nothing written"
    assert tree(tmp_path) == before


def test_inspect_as_text(pair, capsys):
    code, printed, errors = run(capsys, "inspect", *pair)
    assert (code, errors) == (0, "")
    assert f"{pair[0]}: base tiny/base, 1 task(s)" in printed
    assert re.search(r"layers.0.q +12x16 +3 +1.333 +3 ", printed)
    assert f"{pair[0]} and {pair[1]}" in printed
    assert "sign_conflict" not in run(capsys, "inspect", pair[0])[1]


def test_inspect_as_json(tmp_path, pair, capsys):
    labelled = write_folder(tmp_path / "c", seed=3, saved=head(2, 3), labels={HEAD: ["é", "y"]})
    code, printed, _ = run(capsys, "inspect", pair[0], labelled, "--json")
    assert code == 0
    assert json.loads(printed) == {
        "adapters": [describe(pair[0]), describe(labelled)],
        "relations": [relate(pair[0], labelled)],
    }
    alone = json.loads(run(capsys, "inspect", labelled, "--json")[1])
    assert alone["relations"] == []
    assert alone["adapters"][0]["labels"] == {HEAD: ["é", "y"]}


def test_methods_lists_every_method(capsys):
    code, printed, errors = run(capsys, "methods")
    assert (code, errors) == (0, "")
    assert [line.split(":")[0] for line in printed.splitlines() if not line.startswith(" ")] == list(METHODS)
    assert all(method.about in printed and method.paper in printed for method in METHODS.values())


BAD = {
    "no adapter": (["merge", "none", "--output", "out"], "adapter none is not a folder"),
    "method": (["merge", "TASK", "--output", "out", "--method", "x"], "unknown merging method 'x'; valid: pm, average"),
    "two": (["merge", "TASK", "MERGED", "--output", "out"], "method 'pm' folds one adapter into a running merge"),
    "curvature": (["merge", "TASK", "--into", "MERGED", "--output", "out"], "needs curvature="),
    "option": (["merge", "TASK", "--output", "out", "--option", "x"], "--option x: expected key=value"),
    "unknown option": (["merge", "TASK", "--output", "out", "--option", "x=1"], "method pm: unknown option 'x'"),
    "dtype": (["merge", "TASK", "--output", "out", "--dtype", "fp16"], "dtype must be one of float32, float16"),
    "coefficient": (["merge", "TASK", "--output", "out", "--coefficient", "nan"], "coefficient must be finite"),
    "under a file": (["merge", "TASK", "--output", "FILE/out"], "file"),
    "inspect": (["inspect", "none"], "adapter none is not a folder"),
    "inspect second": (["inspect", "TASK", "none", "--json"], "adapter none is not a folder"),
    "train": (["train", "--config", "none.yaml"], "config none.yaml does not exist"),
    "train override": (["train", "--config", "YAML", "speed=3"], "speed: unknown key, did you mean seed?; valid: "),
    "train yaml": (["train", "--config", "FILE"], "expected a mapping of settings"),
    "argument": (["merge", "TASK", "--output", "out", "--speed", "3"], "unrecognised arguments: --speed 3"),
    "no number": (["merge", "TASK", "--output", "out", "--max-rank", "x"], "expected a number or full, found 'x'"),
    "no output": (["merge", "TASK"], "required: --output"),
    "command": (["melt"], "invalid choice: 'melt'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(pair, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("just text")
    Path("config.yaml").write_text("method: pm\n")
    wide = write_folder(tmp_path / "wide", SHAPES | {"layers.1.v": (10, 20)})
    names = {"MERGED": pair[0], "TASK": pair[1], "FILE": "file", "YAML": "config.yaml", "WIDE": str(wide)}
    for placeholder, name in names.items():
        arguments = [argument.replace(placeholder, name) for argument in arguments]
    before = tree(tmp_path)
    code, printed, errors = run(capsys, *arguments)
    assert code == 2
    assert message in errors
    assert printed == ""
    assert len(errors.splitlines()) == 1
    assert tree(tmp_path) == before


def test_failure_while_running_is_exit_code_1(pair, tmp_path, monkeypatch, capsys):
    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pm_hf.adapters.merge, "write_adapter", disk_full)
    code, _, errors = run(capsys, "merge", pair[1], "--output", tmp_path / "out")
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert "No space left on device" in errors


def test_train_that_forgets_too_much_is_exit_code_1(tmp_path, tiny_base, monkeypatch, capsys):
    from pm_hf.runs import learner

    class Scores:
        def table(self):
            return "the scores"

    def forgets(_):
        raise learner.ForgettingError("task 0 lost 0.5", Scores())

    monkeypatch.setattr(learner, "learn", forgets)
    settings = {"output_dir": "run", "model": {"base": str(tiny_base)}, "stream": {"class_groups": 2}}
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    code, printed, errors = run(capsys, "train", "--config", tmp_path / "c.yaml")
    assert (code, printed, errors) == (1, "the scores\n", "pm-hf: task 0 lost 0.5\n")


def test_console_script_ends_with_the_exit_code(tmp_path):
    program = Path(sys.executable).with_name("pm-hf")
    done = subprocess.run(
        [program, "inspect", tmp_path / "none"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"pm-hf: adapter {tmp_path / 'none'} is not a folder: expected a local folder or")
    assert done.stderr.count("\n") == 1


def test_without_a_command_the_help_is_printed(capsys):
    code, printed, errors = run(capsys)
    assert (code, errors) == (0, "")
    assert printed.startswith("usage: pm-hf")
    assert all(f"    {command} " in printed for command in ("train", "merge", "help", "schema"))


def test_version_names_what_pm_hf_stands_on(capsys):
    from importlib.metadata import version

    code, printed, _ = run(capsys, "--version")
    assert code == 0
    assert all(f"{name} {version(name)}" in printed for name in ("torch", "transformers", "peft"))


def test_help_loads_none_of_the_large_libraries():
    program = (
        "import sys\nfrom pm_hf.cli import main\n"
        "for arguments in ([], ['--version'], ['merge', '--help']):\n"
        "    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'transformers', 'rich', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["train", "--help"], ["help"]])
def test_settings_are_listed_with_defaults_and_units(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "100")
    code, printed, errors = run(capsys, *arguments)
    assert (code, errors) == (0, "")
    assert "stream.max_length  int (tokens), at least 1; default 128\n    longest input" in printed
    assert ("--config" in printed) == (arguments[0] == "train")


def test_a_setting_that_is_none_is_one_line(capsys):
    assert run(capsys, "help", "lora.rank") == (2, "", "pm-hf: lora.rank: no such setting; did you mean lora.r?\n")
    assert run(capsys, "help", "lora.r")[1].startswith("lora.r  int, in [1, 8192]; default 8\n    rank\n")


def test_the_schema_is_json(capsys):
    code, printed, errors = run(capsys, "schema")
    assert (code, errors) == (0, "")
    assert json.loads(printed)["properties"]["seed"]["type"] == "integer"


def test_methods_of_a_stream_are_listed_with_what_they_set(capsys):
    code, printed, _ = run(capsys, "methods", "--stream")
    assert code == 0
    lines = printed.splitlines()
    assert "perturbation.scale=0.5" in lines[lines.index("pm:") + 1]
    assert "strategy.replay=generated" in lines[lines.index("best, language models:") + 1]


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_are_what_a_shell_reads(capsys, shell):
    pytest.importorskip("shtab", reason="completion needs shtab")
    code, printed, errors = run(capsys, "completion", shell)
    assert (code, errors) == (0, "")
    assert all(command in printed for command in ("train", "inspect", "allow-missing", "dry-run"))
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=printed, text=True, check=True, capture_output=True)

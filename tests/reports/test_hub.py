"""Pushing a run: the real client against a Hub on the loopback, and loading back from there without pm_hf."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from hashlib import sha256
from io import StringIO

import pytest
import torch
from helpers import refusal
from helpers.hub import TOKEN, run_with_hub, serving
from helpers.models import OLD_NAME
from helpers.records import finished_run
from helpers.streams import CLASSES, first, settings, tensors, write_rows

from pm_hf import InputError
from pm_hf.adapters.layout import ADAPTER_WEIGHTS
from pm_hf.cli import main
from pm_hf.config.schema import ModelSettings
from pm_hf.models.loading import load_merged
from pm_hf.reports.hub import build_upload, push

pytestmark = pytest.mark.filterwarnings(OLD_NAME)
BASE = "owner/tiny-base"
# runs the commands that it reads, one a line; the client would wait seconds between its attempts
CLIENT = """
import json, sys, time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pm_hf.cli import main
time.sleep = lambda seconds: None
for line in sys.stdin:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
# runs the card's own lines, then the same adapter and a task's from its subfolder
LOAD = """
import json, sys
card, repo, task = sys.argv[1:]
exec(open(card).read())
import torch
ids = torch.arange(4, 24).view(2, 10)
with torch.no_grad():
    logits = model.eval()(input_ids=ids).logits.tolist()
other = AutoModelForSequenceClassification.from_pretrained("owner/tiny-base", num_labels=2)
alone = PeftModel.from_pretrained(other, repo, subfolder=task)
sums = {n: float(p.abs().sum()) for n, p in alone.named_parameters() if "lora_" in n}
found = {"logits": logits, "labels": model.config.id2label, "sums": sums}
print(json.dumps(found | {"pm_hf": any(name.startswith("pm_hf") for name in sys.modules)}))
"""


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """A finished run of two tasks, trained in a moment, with a picture and what must stay at home."""
    from pm_hf import learn

    folder = tmp_path_factory.mktemp("secret place")
    for name, count in (("train", 8), ("test", 4)):
        write_rows(folder / f"{name}.csv", CLASSES[:4], count, seed=1)
    config = settings(tiny_base, folder, folder / "run", stream__class_groups=first(2), training__num_train_epochs=1)
    with redirect_stdout(StringIO()):
        learn(config)
    (folder / "run" / "accuracy.png").write_bytes(b"\x89PNG")
    (folder / "run" / "task-01-second" / "checkpoints").mkdir()
    (folder / "run" / "task-01-second" / "checkpoints" / "optimizer.pt").write_bytes(b"state")
    return folder / "run"


@pytest.fixture(scope="module")
def hub(tiny_base, tmp_path_factory):
    """A Hub that has the base model."""
    files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    with serving({BASE: {"main": files}}) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """`client(*arguments)` runs pm-hf in another process: (exit code, stdout, stderr), never with the token."""
    home = tmp_path_factory.mktemp("home")
    names = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    switches = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"), "1")
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")} | names | switches
    with open(home / "stderr", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip

        def ask(*arguments):
            process.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, (home / "stderr").read_text()
            code, out, err = json.loads(answer)
            assert TOKEN not in out + err
            return code, out, err

        yield ask
        process.stdin.close()
        assert process.wait(30) == 0
        process.stdout.close()
    assert (home / "stderr").read_text() == ""


@contextmanager
def watched(hub):
    """The requests that write, made inside the block."""
    start, found = len(hub.seen), []
    yield found
    found += [request for request in hub.seen[start:] if request.startswith(("POST", "PUT"))]


def sent(requests):
    return [request for request in requests if request.startswith("PUT")]


def test_push_and_load_back_without_pm_hf(run, hub, client, tiny_base, tmp_path):
    code, out, err = client("push", run, "me/kept", "--base_model_id", BASE)
    assert (code, out, err) == (0, f"{hub.url}/me/kept\n", "")
    assert "me/kept" in hub.private
    files = hub.repos["me/kept"]["main"]
    assert {name for name in files if "/" not in name} == {
        *(".gitattributes", "README.md", "report.json", "adapter_config.json", ADAPTER_WEIGHTS),
        *("labels.json", "merge_report.json"),
    }
    parts = {"adapter_config.json", ADAPTER_WEIGHTS, "labels.json"}
    for task in ("task-00-first", "task-01-second"):
        assert {name for name in files if task in name} == {f"tasks/{task}/{part}" for part in parts}
    assert {name for name in files if name.startswith("plots/")} == {"plots/accuracy.png"}
    assert len(files) == 7 + 6 + 1
    assert files[ADAPTER_WEIGHTS] == (run / "merged" / ADAPTER_WEIGHTS).read_bytes()
    nothing_private(files.values(), run, tiny_base)
    loads_back(run, hub, files["README.md"].decode(), tiny_base, tmp_path)


def nothing_private(contents, run, tiny_base):
    secrets = [TOKEN, str(run.parent), "secret place", str(tiny_base), str(run.parents[1])]
    assert not [secret for secret in secrets for content in contents if secret.encode() in content]
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def loads_back(run, hub, card, tiny_base, tmp_path):
    (tmp_path / "lines.py").write_text(card.split("```python\n")[1].split("```")[0])
    arguments = (tmp_path / "lines.py", "me/kept", "tasks/task-01-second")
    done = run_with_hub(hub.url, tmp_path / "home", LOAD, *arguments)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    predicted, loaded = done.stdout.splitlines()
    assert predicted in CLASSES[:4]  # the card's code ends in a prediction
    found = json.loads(loaded)
    assert not found["pm_hf"]
    assert list(found["labels"].values()) == list(CLASSES[:4])
    model = load_merged(ModelSettings(str(tiny_base)), run / "merged", CLASSES[:4])
    with torch.no_grad():
        expected = model(input_ids=torch.arange(4, 24).view(2, 10)).logits
    assert torch.equal(torch.tensor(found["logits"]), expected)
    trained = tensors(run / "task-01-second" / "adapter")
    expected = sorted(float(value.abs().sum()) for name, value in trained.items() if "lora_" in name)
    assert sorted(found["sums"].values()) == pytest.approx(expected)


def test_a_second_push_sends_nothing_and_a_third_only_what_changed(run, hub, client):
    arguments = ("push", run, "me/again", "--base_model_id", BASE)
    with watched(hub) as requests:
        assert client(*arguments)[0] == 0
    assert len([request for request in requests if "/commit/" in request]) == 1
    with watched(hub) as requests:
        assert client(*arguments)[0] == 0
    assert not sent(requests)
    assert not [request for request in requests if "/commit/" in request]
    (run / "accuracy.png").write_bytes(b"\x89PNG another")
    before = dict(hub.repos["me/again"]["main"])
    with watched(hub) as requests:
        assert client(*arguments)[0] == 0
    after = hub.repos["me/again"]["main"]
    assert len(sent(requests)) == 1
    assert {name for name in after if after[name] != before[name]} == {"plots/accuracy.png"}


def test_files_that_a_later_run_does_not_have_are_removed_and_others_kept(run, hub, client):
    client("push", run, "me/older", "--base_model_id", BASE)
    files = hub.repos["me/older"]["main"]
    files |= {"tasks/task-02-gone/adapter_config.json": b"{}", "plots/gone.png": b"x", "notes.txt": b"by hand"}
    assert client("push", run, "me/older", "--base_model_id", BASE)[0] == 0
    assert not [name for name in files if "gone" in name]
    assert files["notes.txt"] == b"by hand"


@pytest.mark.parametrize("part", ["PUT /lfs/", "POST /commit/"])
def test_an_interrupted_push_is_finished_by_the_second_one(tmp_path, hub, client, part):
    run, repo = finished_run(tmp_path / "run"), f"me/cut-{part[:3].lower()}"
    weights = run / "task-00-news" / "adapter" / ADAPTER_WEIGHTS
    hub.objects.clear()
    hub.drops[part if "commit" in part else f"PUT {sha256(weights.read_bytes()).hexdigest()}"] = 1000
    code, out, err = client("push", run, repo, "--base_model_id", BASE)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert f"the upload to {repo} stopped, push again: what has arrived is kept: RemoteProtocolError" in err
    assert list(hub.repos[repo]["main"]) == [".gitattributes"]
    assert repo in hub.private
    hub.drops.clear()
    arrived = set(hub.objects)
    with watched(hub) as requests:
        code, out, err = client("push", run, repo, "--base_model_id", BASE)
    assert (code, out, err) == (0, f"{hub.url}/{repo}\n", "")
    assert {request.rpartition("/")[2] for request in sent(requests)} == set(hub.objects) - arrived
    assert len(sent(requests)) == (0 if "commit" in part else 1)
    assert hub.repos[repo]["main"][f"tasks/task-00-news/{ADAPTER_WEIGHTS}"] == weights.read_bytes()


def test_visibility_is_the_one_asked_for_or_an_error(run, hub, client):
    assert client("push", run, "me/open", "--base_model_id", BASE, "--public")[0] == 0
    assert "me/open" not in hub.private
    code, _, err = client("push", run, "me/open", "--base_model_id", BASE)
    assert code == 2
    assert "me/open exists and is public; give --public, or push to another repository" in err
    hub.private.add("me/open")
    code, _, err = client("push", run, "me/open", "--base_model_id", BASE, "--public")
    assert (code, "me/open exists and is private" in err) == (2, True)


def test_what_the_hub_does_not_allow_is_one_line_before_any_upload(run, hub, client):
    hub.repos["me/other"] = {"main": {"config.json": b"{}", "model.safetensors": b"x", "README.md": b"card"}}
    hub.private.add("me/other")
    expected = {
        ("me/new", "owner/nothing"): "base model owner/nothing is not on the Hub, or not visible to this account",
        ("me/other", BASE): "me/other holds something else (config.json, model.safetensors); push to another",
        ("stranger/new", BASE): "the Hub answered 403; log in (hf auth login, or HF_TOKEN) with an account that may",
    }
    with watched(hub) as requests:
        for (repo, base), message in expected.items():
            code, out, err = client("push", run, repo, "--base_model_id", base)
            assert (code, out, len(err.splitlines())) == (2, "", 1)
            assert message in err
    assert not sent(requests)
    assert not [request for request in requests if "commit" in request or "preupload" in request]
    assert "me/new" not in hub.repos


def test_dry_run_prints_the_files_and_the_card_and_asks_nobody(run, hub, client, capsys):
    start = len(hub.seen)
    code, out, err = client("push", run, "me/dry", "--base_model_id", BASE, "--dry-run")
    assert (code, err) == (0, "")
    assert len(hub.seen) == start
    listed = [line.split("  ")[-1] for line in out.split("\n\n")[0].splitlines()]
    assert {
        "README.md",
        "report.json",
        ADAPTER_WEIGHTS,
        f"tasks/task-00-first/{ADAPTER_WEIGHTS}",
        "plots/accuracy.png",
    } < set(listed)
    assert not [name for name in listed if "curvature" in name or "checkpoint" in name]
    size = f"{(run / 'merged' / ADAPTER_WEIGHTS).stat().st_size:,d}"
    assert f"{size}  {ADAPTER_WEIGHTS}" in out
    assert f"base_model: {BASE}" in out
    assert out.endswith("dry run: nothing uploaded to me/dry\n")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "me/na..me", "me/na me", "/me/name", ""])
def test_an_impossible_repository_is_refused_without_the_network(run, repo, capsys):
    assert main(["push", str(run), repo, "--base_model_id", BASE]) == 2
    assert "expected owner/name, as on the Hub" in capsys.readouterr().err


def test_a_picture_that_names_a_local_path_or_the_token_is_not_uploaded(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    (run / "a.svg").write_text(f"<svg>{run}</svg>")
    (run / "b.svg").write_text(f"<svg>{TOKEN}</svg>")
    (run / "c.svg").write_text("<svg></svg>")
    with pytest.raises(InputError, match="2 problems: plots/a.svg names a local path .* plots/b.svg") as caught:
        build_upload(run, "me/x", base_model_id=BASE)
    assert TOKEN not in str(caught.value)


def test_without_a_login_nothing_is_asked(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match="cannot be pushed to me/x: not logged in; log in"):
        push(run, "me/x", base_model_id=BASE)


def test_a_bad_run_is_one_line_and_exit_code_two(tmp_path, capsys):
    assert main(["push", str(tmp_path), "me/x"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "has no report.json" in err


def test_a_hub_that_is_switched_off_is_named(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    message = refusal(push, run, "me/x", base_model_id=BASE)
    assert "HF_HUB_OFFLINE is set; unset it" in message
    assert TOKEN not in message


def test_a_card_that_the_hub_refuses_stops_before_the_repository_is_made(tmp_path, hub, client):
    run = finished_run(tmp_path / "run", stream={"tasks": [{"name": "a", "dataset": "a/b"}, {"name": "b"}]})
    hub.refused = "a/b"
    code, out, err = client("push", run, "me/refused", "--base_model_id", BASE)
    hub.refused = None
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert 'the Hub refuses the card: {"errors": [{"message": "\\"a/b\\" is not a valid id"}]' in err
    assert "me/refused" not in hub.repos

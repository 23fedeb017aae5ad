"""Merge x head x drift x start on training rows: what `best` is made of was chosen here, never on test rows.

python benchmarks/streams/ablation.py --streams clinc150 pacs --seeds 0 [--cells fisher average …]
python benchmarks/streams/ablation.py                                   only the table of what is in results/ablation/

Scored is a fifth of each task's training rows, which is held out. A cell is a way to train and to merge; those with
linear heads are trained once, and the other heads are computed from the features of their merges, so that they differ
in nothing else. Controls with the same heads: the frozen backbone, the first task's LoRA, joint training. Writes
results/ablation/STREAM/CELL-seedK.json and table.md.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import SHARED, anywhere, data_settings, lacking_input, pictures_folder, pooled, prepare
from environment import ROOT, environment
from grid import STREAMS
from pictures import kept
from tables import spread

from pm_hf.config.loading import load_config
from pm_hf.data.stream import Task, load_stream
from pm_hf.files import write_json
from pm_hf.measuring.analytic_head import HeadStatistics, class_logits, ridge_drift
from pm_hf.runs.learner import Run, learn

SHARE = 0.2  # of the training rows, held out where settings are chosen
PROJECTION = 2048  # random features of RanPAC
RIDGES = tuple(10.0**power for power in range(9))  # RanPAC's, chosen on a fifth of its training rows
DRAWS = 200  # features drawn a class for an aligned head
DIRECTIONS, OWN_SHARE = 16, 0.3  # k and β of the bound head
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where heads that are trained are trained


SEEN: dict[str, Any] = {"method": "best", "merge.on_zero_curvature": "average"}  # whose head.training is seen
ANALYTIC: dict[str, Any] = {"head.kind": "lda", "head.training": "seen"}
MEAN: dict[str, Any] = {"method": "average", **ANALYTIC}
PRIOR = {"merge.options": {"prior": 1.0}}
SLOW = {"training.learning_rate": 1e-3}
STEP = {"merge.options": {"coefficient": 0.2}}


def _merge(method: str, start: str = "merged", more: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"method": method, "merge.train_from": start, "perturbation.scale": 0.0, "head.kind": "linear"} | (
        more or {}
    )


# {name in paths: (title, settings)}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "sequential": ("α = 1, from the merge", _merge("sequential")),
    "average": ("1/t, from the merge", _merge("average")),
    "average-last": ("1/t, from the last optimum", _merge("average", "last")),
    "constant": ("α = 0.2, from the merge", _merge("coma", more=STEP)),
    "constant-last": ("α = 0.2, from the last optimum", _merge("coma", "last", STEP)),
    "fisher": ("Fisher α, from the merge", _merge("merge_only")),
    "fisher-last": ("Fisher α, from the last optimum", _merge("merge_only", "last")),
    "fisher-perturbed": ("Fisher α, perturbed, from the merge", _merge("pm", more={"perturbation.scale": 0.5})),
    "fisher-seen": ("Fisher α, against all classes seen", SEEN),
    "average-seen": ("1/t, against all classes seen", MEAN),
    "average-seen-slow": ("1/t, against all classes seen, learning rate 1e-3", MEAN | SLOW),
    "prior-seen": ("1/(t + 1), against all classes seen", MEAN | PRIOR),
    "prior-seen-slow": ("1/(t + 1), against all classes seen, learning rate 1e-3", MEAN | PRIOR | SLOW),
    "sequential-seen": ("α = 1, against all classes seen", {"method": "sequential", **ANALYTIC}),
    "half-seen": (
        "α = 0.5, against all classes seen",
        {"method": "coma", "merge.options": {"coefficient": 0.5}, **ANALYTIC},
    ),
    "search-seen": (
        "α by search, against all classes seen",
        {"method": "best", "merge.coefficient": "search"},
    ),
    "gram-seen": (
        "free Gram, against all classes seen",
        {"method": "pm_gram_lda", "perturbation.scale": 0.0, **ANALYTIC},
    ),
    "prior": ("1/(t + 1), from the merge", _merge("average", more=PRIOR)),
    "prior-slow": ("1/(t + 1), from the merge, learning rate 1e-3", _merge("average", more=PRIOR | SLOW)),
    "fisher-slow": ("Fisher α, learning rate 1e-3", _merge("merge_only", more=SLOW)),
    "gram": ("free Gram, from the merge", _merge("pm_gram")),
    "frozen": ("frozen backbone", {"method": "frozen"}),
    "joint": ("joint training", {"method": "joint", "head.kind": "linear"}),
}
FIRST = "first"  # a control made of the features of another cell
TITLES = {cell: title for cell, (title, _) in CELLS.items()} | {FIRST: "first task's LoRA"}
DRIFTS = ("lda, none", "lda, mean shift", "lda, ridge", "lda, oracle")
SHRUNK = {f"lda, shrunk {share}": share for share in (0.1, 0.3, 0.6)}  # of Σ, beyond what OAS takes
HEADS = ("linear", "aligned", "bound", "bound, oracle", *DRIFTS, *SHRUNK, "lda, one mean a class")
HEADS += ("joint head", "RanPAC")


def main() -> int:
    """Train what is missing, compute the heads, write the table; 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="*", choices=list(STREAMS), default=[])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder with text/ and image/")
    parser.add_argument("--models", type=Path, default=SHARED / "models", help="folder with the ViTs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder for the runs themselves")
    parser.add_argument("--features", type=Path, help="folder for the features that the heads were computed of")
    options = parser.parse_args()
    if lacking := lacking_input(options.streams, options):
        parser.error(lacking)
    asked = [(name, cell, seed) for name in options.streams for seed in options.seeds for cell in options.cells]
    for name in options.streams:
        prepare(name, options)
    failed = pooled(cell_result, [job for job in asked if not result_path(*job).exists()], options)
    (ROOT / "results" / "ablation" / "table.md").write_text(text := table(), encoding="utf-8")
    print(text)
    return int(failed > 0)


def result_path(name: str, cell: str, seed: int) -> Path:
    """The file of one cell."""
    return ROOT / "results" / "ablation" / name / f"{cell}-seed{seed}.json"


def cell_result(job: tuple[str, str, int], options: argparse.Namespace) -> None:
    """One run, the heads on its features, and the file of them."""
    name, cell, seed = job
    folder = options.runs / name / f"{cell}-{seed}"
    source, changes = data_settings(name, seed, folder, options)
    with kept(pictures_folder(name, options)):
        report = learn(source, seed=seed, **(changes | held_out(source, changes) | CELLS[cell][1]))
        config = load_config(folder / "config.yaml")
        scores = {} if config.head.kind == "lda" else {"linear": report.metrics["ACC"]}
        features = Features(Run(config, load_stream(config)))
        accuracies: dict[str, Any] = {cell: scores | heads(features, cell)}
        if cell == "fisher":
            accuracies[FIRST] = heads(features, FIRST)
        if options.features is not None:
            features.save(options.features / f"{name}-{cell}-{seed}.safetensors")
    path = result_path(*job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "stream": name,
            "cell": cell,
            "seed": seed,
            "ACC": accuracies,
            "config": anywhere(config.to_dict()),
            **environment(),
        },
    )


def held_out(source: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that score on a fifth of the training rows in place of the test rows."""
    listed = changes.get("stream.tasks") or yaml.safe_load(source.read_text(encoding="utf-8"))["stream"].get("tasks")
    settings: dict[str, Any] = {"stream.test": None, "stream.test_share": SHARE}
    return settings | ({"stream.tasks": [{**task, "test": None} for task in listed]} if listed else {})


class Features:
    """Input of the head under the merges of one run; each merge is loaded, and each part read, once."""

    def __init__(self, run: Run) -> None:
        self.run, self.tasks = run, run.stream.tasks
        self.scored = run.stream.scored or run.stream.tasks  # joint training has one task, and is scored on each
        self._models: dict[int, nn.Module] = {}
        self._known: dict[tuple[int, int, bool], Tensor] = {}

    def of(self, merge: int, task: int, *, test: bool = False) -> Tensor:
        """Features (n, d) of a task's rows under the merge after task `merge`."""
        key = (merge, task, test)
        if key not in self._known:
            part, head = (self.scored if test else self.tasks)[task], str(self.run.folder.record(merge).head)
            if merge not in self._models:
                self._models[merge] = self.run.scorer.load(self.run.folder.task(merge).merged, head)[0]
            rows = part.test if test else part.train
            self._known[key] = self.run.scorer.features_of(self._models[merge], rows, part.own, head).double()
        return self._known[key]

    def save(self, path: Path) -> None:
        """Write what was read, float16, as MERGE/TASK/train or test, with the index of each row's class among those of
        its task; for heads that are not thought of yet."""
        sides = {False: "train", True: "test"}
        tensors = {f"{merge}/{task}/{sides[test]}": rows.half() for (merge, task, test), rows in self._known.items()}
        for side, tasks in (("train", self.tasks), ("test", self.scored)):
            for index, task in enumerate(tasks):
                tensors[f"{index}/{side}"] = _targets(task, list(task.own), test=side == "test")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {"own": json.dumps([task.own for task in self.tasks])})


def heads(features: Features, cell: str) -> dict[str, float]:
    """{head: ACC, the mean over tasks of the accuracy among all classes} on the features of the last merge."""
    run, tasks = features.run, features.tasks
    end = 0 if cell == FIRST else len(tasks) - 1
    labels = list(dict.fromkeys(label for task in tasks for label in task.own))
    train = [(features.of(end, i), _targets(task, labels, test=False)) for i, task in enumerate(tasks)]
    test = [
        (features.of(end, i, test=True), _targets(task, labels, test=True)) for i, task in enumerate(features.scored)
    ]

    def score(logits: Callable[[Tensor], Tensor]) -> float:
        return fmean(float((logits(rows).argmax(1) == truth).double().mean()) for rows, truth in test)

    everything = torch.cat([rows for rows, _ in train]), torch.cat([truth for _, truth in train])
    domains = run.stream.scenario == "domain_incremental"
    oracle, own = HeadStatistics(), list[Tensor]()
    for (rows, _), task in zip(train, tasks, strict=True):
        targets = _targets(task, list(task.own), test=False)
        oracle = oracle.added(rows, targets, list(task.own), one_mean_per_task=domains)
        own += _directions(rows, targets)
    moving = cell not in (FIRST, "frozen", "joint")
    accuracies = {"lda, oracle" if moving else "lda, none": score(_linear(oracle))}
    accuracies["bound, oracle" if moving else "bound"] = score(_bound(oracle, own))
    if moving:
        followed = {
            drift: _followed(features, drift, one_mean_per_task=domains) for drift in ("none", "mean shift", "ridge")
        }
        accuracies |= {f"lda, {drift}": score(_linear(statistics)) for drift, (statistics, _) in followed.items()}
        accuracies |= {head: score(_shrunk(followed["ridge"][0], share)) for head, share in SHRUNK.items()}
        accuracies["aligned"] = score(_aligned(followed["ridge"][0], labels))
        accuracies["bound"] = score(_bound(*followed["ridge"]))
        if domains:
            once, _ = _followed(features, "ridge", one_mean_per_task=False)
            accuracies["lda, one mean a class"] = score(_linear(once))
    else:
        accuracies["RanPAC"] = score(_random_projection(*everything, len(labels)))
    return accuracies | {"joint head": score(_logistic(*everything))}


def _targets(task: Task, labels: list[str], *, test: bool) -> Tensor:
    index = {label: i for i, label in enumerate(labels)}
    return torch.tensor([index[label] for label in (task.test if test else task.train).labels])


def _followed(features: Features, drift: str, *, one_mean_per_task: bool) -> tuple[HeadStatistics, list[Tensor]]:
    """The statistics after the last task, each merge's drift estimated from the rows of its own task; and the own
    directions of each class of them."""
    statistics, own = HeadStatistics(), list[Tensor]()
    for index, task in enumerate(features.tasks):
        now = features.of(index, index)
        if index and drift != "none":
            before = features.of(index - 1, index)
            if drift == "ridge":
                moved = ridge_drift(before, now, features.run.config.head.ridge)
                statistics, own = statistics.moved(moved), [directions @ moved.T for directions in own]
            else:
                statistics.means += (now - before).mean(0)
        targets = _targets(task, list(task.own), test=False)
        statistics = statistics.added(now, targets, list(task.own), one_mean_per_task=one_mean_per_task)
        own += _directions(now, targets)
    return statistics, own


def _directions(rows: Tensor, targets: Tensor) -> list[Tensor]:
    """U_c (k, d) of each class: the largest singular rows of its centred features, over √(n_c − 1)."""
    made = []
    for label in range(int(targets.max()) + 1):
        of_class = rows[targets == label]
        _, sizes, vectors = torch.linalg.svd(of_class - of_class.mean(0), full_matrices=False)
        made.append((sizes[:, None] * vectors)[:DIRECTIONS] / max(len(of_class) - 1, 1) ** 0.5)
    return made


def _bound(statistics: HeadStatistics, own: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The head that minimises an upper bound of the expected cross-entropy of Gaussian classes, from the analytic rows.

    J(W, b) = mean_c log Σ_j exp((w_j − w_c)ᵀμ_c + b_j − b_c + ½(w_j − w_c)ᵀΣ_c(w_j − w_c)) + 1e-4·mean(W²) with
    Σ_c = (1 − β)Σ + βU_cᵀU_c, Jensen's inequality for N(μ_c, Σ_c); β = 0 is near the analytic head.
    """
    weight, bias = (part.to(DEVICE).requires_grad_() for part in statistics.solve())
    means, shared = statistics.means.to(DEVICE), statistics.pooled_covariance().to(DEVICE)
    widest = max(len(directions) for directions in own)
    stacked = torch.stack([torch.nn.functional.pad(u, (0, 0, 0, widest - len(u))) for u in own]).to(DEVICE)  # (C, k, d)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        logits = means @ weight.T + bias
        gram = weight @ shared @ weight.T
        spread = gram.diagonal()[None] - 2 * gram + gram.diagonal()[:, None]
        seen = stacked @ weight.T  # (C, k, C)
        away = ((seen - seen.diagonal(dim1=0, dim2=2).T[:, :, None]) ** 2).sum(1)
        exponent = logits - logits.diagonal()[:, None] + ((1 - OWN_SHARE) * spread + OWN_SHARE * away) / 2
        loss = exponent.logsumexp(1).mean() + 1e-4 * (weight**2).mean()
        loss.backward()
        return loss

    optimiser.step(objective)
    solved = weight.detach().cpu(), bias.detach().cpu()
    return lambda rows: class_logits(rows @ solved[0].T + solved[1], statistics.labels)[0]


def _linear(statistics: HeadStatistics) -> Callable[[Tensor], Tensor]:
    """Logits of every class, the largest of its rows."""
    weight, bias = statistics.solve()
    return lambda rows: class_logits(rows @ weight.T + bias, statistics.labels)[0]


def _shrunk(statistics: HeadStatistics, share: float) -> Callable[[Tensor], Tensor]:
    """The analytic head with so much of the pooled covariance replaced by a multiple of the identity."""
    pooled = statistics.pooled_covariance()
    identity = torch.eye(len(pooled), dtype=pooled.dtype) * pooled.trace() / len(pooled)
    covariance = (1 - share) * pooled + share * identity
    return _linear(replace(statistics, covariance=covariance, center=statistics.grand_mean()))


def _aligned(statistics: HeadStatistics, labels: list[str]) -> Callable[[Tensor], Tensor]:
    """Logistic regression on draws from the stored Gaussians, one covariance for all classes (after SLCA)."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([labels.index(label) for label in statistics.labels])
    factor = torch.linalg.cholesky(statistics.pooled_covariance())
    drawn = [
        torch.randn(DRAWS, len(factor), generator=generator, dtype=torch.float64) @ factor.T + mean
        for mean in statistics.means
    ]
    return _logistic(torch.cat(drawn), classes.repeat_interleave(DRAWS))


def _logistic(rows: Tensor, truth: Tensor) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features with the penalty ½‖W‖² beside the sum of the losses
    (scikit-learn's default): 20,000 draws of 100 classes take a minute on a core."""
    mean, deviation = rows.mean(0), rows.std(0).clamp(min=1e-12)
    inputs, targets = ((rows - mean) / deviation).to(DEVICE, torch.float32), truth.to(DEVICE)
    layer = torch.nn.Linear(rows.shape[1], int(truth.max()) + 1, device=DEVICE)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=300, history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(inputs), targets)
        loss = loss + (layer.weight**2).sum() / (2 * len(inputs))
        loss.backward()
        return loss

    optimiser.step(objective)
    solved = layer.weight.detach().cpu().double(), layer.bias.detach().cpu().double()
    return lambda asked: (asked - mean) / deviation @ solved[0].T + solved[1]


def _random_projection(rows: Tensor, truth: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """RanPAC (arXiv 2307.02251): ridge regression on ReLU of a frozen random projection; not linear in the features."""
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(rows.shape[1], PROJECTION, generator=generator, dtype=torch.float64)
    project = lambda inputs: (inputs @ projection).relu()  # noqa: E731
    rows, truth, projection = rows.to(DEVICE), truth.to(DEVICE), projection.to(DEVICE)
    hidden, answers = project(rows), torch.nn.functional.one_hot(truth, classes).double()
    order = torch.randperm(len(rows), generator=generator)
    held, kept = order[: len(rows) // 5], order[len(rows) // 5 :]
    gram, pull = hidden[kept].T @ hidden[kept], hidden[kept].T @ answers[kept]
    unit = torch.eye(PROJECTION, dtype=torch.float64, device=DEVICE)
    scored = [
        ((hidden[held] @ torch.linalg.solve(gram + ridge * unit, pull)).argmax(1) == truth[held]).sum()
        for ridge in RIDGES
    ]
    ridge = RIDGES[int(torch.stack(scored).argmax())]
    weight = torch.linalg.solve(hidden.T @ hidden + ridge * unit, hidden.T @ answers)
    return lambda inputs: (project(inputs.to(DEVICE)) @ weight).cpu()


def table() -> str:
    """ACC of every cell with every head that the stream has, a table for each stream, as Markdown."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for path in sorted((ROOT / "results" / "ablation").glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for cell, scores in result["ACC"].items():
            for head, value in scores.items():
                values.setdefault(path.parent.name, {}).setdefault(cell, {}).setdefault(head, []).append(value)
    parts = []
    for name in (name for name in STREAMS if name in values):
        known = [head for head in HEADS if any(head in scores for scores in values[name].values())]
        lines = [f"### {STREAMS[name].title}", "", "| merge and start | " + " | ".join(known) + " |"]
        lines.append("|---" * (len(known) + 1) + "|")
        for cell, title in TITLES.items():
            if cell not in values[name]:
                continue
            scores = values[name][cell]
            shown = [spread(scores[head], interval=False) if head in scores else "–" for head in known]
            lines.append(f"| {title} | " + " | ".join(shown) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())

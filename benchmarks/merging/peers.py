"""Our methods beside fusion-bench's and mergekit's own code on the same task vectors: results/merging/peers.*

python benchmarks/merging/peers.py [--fusion-bench PYTHON] [--mergekit PYTHON] [--no-results]

PYTHON is the interpreter of an environment with the peer: one with torch==2.13.0 fusion-bench==0.2.33 "transformers<5"
"datasets<5" "peft<0.20" (its OPCM does not import with newer ones), another with torch==2.13.0 mergekit==0.1.5. Each
number is ‖ours − theirs‖/‖theirs‖ over all modules, ours as merge_adapters writes it with max_rank="full". The peer
gets the same task vectors in float64, and where a method draws masks, our masks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from environment import ROOT, environment

from pm_hf import merge_adapters
from pm_hf.adapters.folder import open_adapter
from pm_hf.files import write_json
from pm_hf.merging.curvature import CurvatureKind, CurvatureSpec, accumulate
from pm_hf.merging.methods.ties import dare_mask

RESULTS = ROOT / "results" / "merging"
WORKER = Path(__file__).with_name("peers_worker.py")
SHAPES = {"first": (18, 24), "second": (20, 18)}  # (out, in)
TASKS, RANK, SEED = 4, 5, 0
SHRINKAGE, STEPS, LEARNING_RATE, DROP_DENSITY = 0.1, 25, 0.02, 0.4
SETTINGS = {
    "tasks": TASKS,
    "task_arithmetic": 0.3,
    "ties_density": 0.2,
    "dare_density": DROP_DENSITY,
    "doge_keep": 0.3,
    "shrinkage": SHRINKAGE,
    "learning_rate": LEARNING_RATE,
    "steps": STEPS,
    "weights": [0.4, 1.3, 0.8, 0.2],
}
NOTES = {
    ("fusion-bench", "average"): "means of whole models",
    ("fusion-bench", "ties"): "one module at a time, and as many entries kept as ours (it keeps int(share·N) + 1)",
    ("fusion-bench", "ties, whole model"): "differs by convention: it trims over the whole model, we trim each tensor, "
    "as PEFT and mergekit do",
    ("fusion-bench", "dare"): "our masks",
    ("fusion-bench", "dare_ties"): "our masks, its second trimming after the drop switched off, one module at a time",
    ("fusion-bench", "magmax"): "its default scale 0.5 set to 1; of equals it takes the last, we the first",
    ("fusion-bench", "opcm"): "task vectors of full rank",
    ("fusion-bench", "opcm, low rank"): "rank 5: its full SVD completes the null space by an arbitrary basis and drops "
    "the task's part on that basis' diagonal; we work inside the numerical rank",
    ("fusion-bench", "doge"): "a share that keeps as many entries as ours",
    ("fusion-bench", "lot"): "its RegMean: the same closed form, off-diagonals times 1 − ρ",
    ("fusion-bench", "cofima"): "its Fisher merging, not normalised, no floor under the Fisher",
    ("fusion-bench", "adamerging"): "25 steps, the same batch of each task at every step; its clamp to [0, 1] off; "
    "it adds 1e-8 inside the log",
    ("mergekit", "average"): "linear",
    ("mergekit", "ties"): "equal weights",
    ("mergekit", "ties, unequal weights"): "differs by convention: it elects signs of wᵢτᵢ and divides by Σwᵢ of those "
    "that agree; we, as PEFT, elect signs of τᵢ and divide by their number",
    ("mergekit", "dare"): "our masks, rescaling by 1/density",
    ("mergekit", "dare, its own rescaling"): "differs by convention: it rescales each tensor to the L1 norm it had",
    ("mergekit", "dare_ties"): "our masks, rescaling by 1/density, normalize: true (its default is a sum, ours a mean)",
}
ABSENT = "in neither package: lore, adarank, slao, LOT itself (RegMean is its closed form), and our pm"
Tensors = Mapping[str, Tensor]


def main() -> int:
    """Merge, let the peers merge, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusion-bench", help="interpreter with fusion-bench")
    parser.add_argument("--mergekit", help="interpreter with mergekit")
    parser.add_argument("--no-results", action="store_true", help="print only")
    options = parser.parse_args()
    given = {"fusion-bench": options.fusion_bench, "mergekit": options.mergekit}
    peers = {peer: python for peer, python in given.items() if python}
    if not peers:
        parser.error("give --fusion-bench, --mergekit or both")
    torch.set_num_threads(1)
    peer_results: dict[str, dict] = {peer: {"differences": {}} for peer in peers}
    with tempfile.TemporaryDirectory() as temporary:
        for rank, suffix in ((min(min(shape) for shape in SHAPES.values()), ""), (RANK, ", low rank")):
            folder = Path(temporary) / f"rank-{rank}"
            ours = Ours(folder, rank)
            for peer, python in peers.items():
                theirs, versions = run(peer, python, folder)
                peer_results[peer]["versions"] = versions
                compared = {name + suffix: difference(ours, name, update) for name, update in theirs.items()}
                peer_results[peer]["differences"] |= compared
    text = table(peer_results)
    print(text)
    if not options.no_results:
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(
            RESULTS / "peers.json", {"peers": peer_results, "settings": SETTINGS, "shapes": SHAPES, **environment()}
        )
        (RESULTS / "peers.md").write_text(text, encoding="utf-8")
    return 0


class Ours:
    """Adapters, curvature and inputs in a folder, and what our methods make of them."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        folder.mkdir()
        generator = torch.Generator().manual_seed(SEED)
        self.base = {name: torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}
        self.adapters = [self._adapter(i, generator) for i in range(TASKS)]
        products = [open_adapter(path).products() for path in self.adapters]
        self.tasks = [{name: p[name].to(torch.float64).dense() for name in SHAPES} for p in products]
        self.grams = [{n: self._gram(shape[1], generator) for n, shape in SHAPES.items()} for _ in products]
        self.fishers = [{n: torch.rand(s, generator=generator).double() for n, s in SHAPES.items()} for _ in products]
        self.curvature = {"gram": self._curvature("gram", products), "fisher": self._curvature("fisher", products)}
        width = SHAPES["first"][1]
        self.inputs = {f"task_{i}": torch.randn(16, width, generator=generator).double() for i in range(TASKS)}
        self._write()

    def merge(self, method: str, **settings) -> dict[str, Tensor]:
        """The dense update of a merge of all adapters."""
        output = self.folder / "merged"
        merge_adapters(self.adapters, output, method=method, max_rank="full", overwrite=True, **settings)
        return self._dense(output)

    def fold(self, method: str) -> dict[str, Tensor]:
        """The dense update after folding the adapters one by one."""
        running = None
        for i, adapter in enumerate(self.adapters):
            output = self.folder / f"folded-{method}-{i}"
            if not output.exists():
                merge_adapters(adapter, output, into=running, method=method, max_rank="full")
            running = output
        assert running is not None
        return self._dense(running)

    def adamerging(self) -> dict[str, Tensor]:
        """The dense update with learned coefficients."""
        from pm_hf.measuring.learned_coefficients import learn_coefficients

        class Model(nn.Module):
            """Linear layers with tanh between them."""

            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = (nn.Linear(n, m, bias=False) for m, n in SHAPES.values())

            def forward(self, x: Tensor) -> Tensor:
                """Logits."""
                return self.second(torch.tanh(self.first(x)))

        model = Model().double()
        for name, weight in self.base.items():
            model.get_submodule(name).weight.data = weight
        learned = learn_coefficients(
            model,
            [[{"x": x}] for x in self.inputs.values()],
            self.adapters,
            steps=STEPS,
            learning_rate=LEARNING_RATE,
            predict=lambda model, batch: model(batch["x"]),
        )
        return self.merge("adamerging", learned=learned)

    def _adapter(self, index: int, generator: torch.Generator) -> Path:
        path = self.folder / f"adapter-{index}"
        path.mkdir()
        tensors = {}
        for name, (out, columns) in SHAPES.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(self.rank, columns, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, self.rank, generator=generator) / 20
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": self.rank, "lora_alpha": self.rank, "target_modules": list(SHAPES)}
        write_json(path / "adapter_config.json", config | {"base_model_name_or_path": "peers"})
        return path

    def _gram(self, width: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(3 * width, width, generator=generator).double()
        return x.T @ x / len(x)

    def _curvature(self, kind: CurvatureKind, products: list) -> list[Path]:
        paths = []
        for i, product in enumerate(products):
            measured = dict(getattr(self, f"{kind}s")[i])
            optimum = {name: product[name] for name in SHAPES}
            settings = CurvatureSpec(kind=kind, shrinkage=SHRINKAGE if kind == "gram" else 0.0)
            paths.append(self.folder / f"{kind}-curvature-{i}.safetensors")
            accumulate(measured, optimum, optimum, settings, 8).save(paths[-1])
        return paths

    def _write(self) -> None:
        write_json(self.folder / "settings.json", SETTINGS)
        save_file(self.base, self.folder / "base.safetensors")
        save_file(self.inputs, self.folder / "inputs.safetensors")
        for i in range(TASKS):
            masks = {name: dare_mask(name, i, shape, density=DROP_DENSITY, seed=SEED) for name, shape in SHAPES.items()}
            files = {"task": self.tasks[i], "gram": self.grams[i], "fisher": self.fishers[i], "mask": masks}
            for kind, tensors in files.items():
                save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / f"{kind}-{i}.safetensors")

    def _dense(self, path: Path) -> dict[str, Tensor]:
        products = open_adapter(path).products()
        return {name: products[name].to(torch.float64).dense() for name in SHAPES}


def difference(ours: Ours, name: str, theirs: Tensors) -> float:
    """‖ours − theirs‖/‖theirs‖ for one method."""
    tensors = merged(ours, name)
    gap = sum(float((tensors[module] - update).square().sum()) for module, update in theirs.items())
    return (gap / sum(float(update.square().sum()) for update in theirs.values())) ** 0.5


def merged(ours: Ours, name: str) -> dict[str, Tensor]:
    """Our result for a row of the comparison."""
    method, _, variant = name.partition(", ")
    if method == "opcm":
        return ours.fold(method)
    if method == "adamerging":
        return ours.adamerging()
    settings: dict[str, dict] = {
        "task_arithmetic": {"weights": [SETTINGS["task_arithmetic"]] * TASKS},
        "ties": {"options": {"density": SETTINGS["ties_density"]}},
        "dare": {"options": {"density": SETTINGS["dare_density"], "seed": SEED}},
        "dare_ties": {"options": {"density": SETTINGS["dare_density"], "seed": SEED}},
        "doge": {"options": {"keep": SETTINGS["doge_keep"]}},
        "lot": {"curvature": ours.curvature["gram"]},
        "cofima": {"curvature": ours.curvature["fisher"]},
    }
    weights = {"weights": SETTINGS["weights"]} if variant == "unequal weights" else {}
    return ours.merge(method, **settings.get(method, {}), **weights)


def run(peer: str, python: str, folder: Path) -> tuple[dict[str, Tensors], dict[str, str]]:
    """({method: its merged update}, versions) of a peer."""
    done = subprocess.run([python, str(WORKER), peer, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr[-3000:]}")
    updates = {path.stem: load_file(path) for path in sorted((folder / peer).glob("*.safetensors"))}
    return updates, json.loads((folder / peer / "versions.json").read_text(encoding="utf-8"))


def table(peer_results: Mapping[str, Mapping]) -> str:
    """One line for each method and peer, as Markdown; low rank only where it differs in kind."""
    lines = ["| method | peer | relative difference | set for the comparison |", "|---|---|---|---|"]
    for peer, result in peer_results.items():
        version = result["versions"][peer]
        for name, gap in sorted(result["differences"].items()):
            if ", low rank" not in name or (peer, name) in NOTES:
                note = NOTES.get((peer, name), "")
                lines.append(f"| {name} | {peer} {version} | {gap:.1e} | {note} |")
    return "\n".join([*lines, "", ABSENT]) + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""The peer's half of merge_peers.py: runs fusion-bench or mergekit on plain tensors, in the peer's own environment.

python peers_worker.py fusion-bench|mergekit FOLDER

FOLDER holds settings.json and, in float64, base, task-i (task vectors), mask-i, gram-i, fisher-i and inputs
(.safetensors, {module: tensor}). Writes FOLDER/<peer>/<method>.safetensors, the merged update, and versions.json. It
imports nothing of pm_hf.
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Data:
    """What merge_peers.py wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.settings = folder, json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.base, self.inputs = load_file(folder / "base.safetensors"), load_file(folder / "inputs.safetensors")
        self.tasks, self.masks, self.grams, self.fishers = (self.each(k) for k in ("task", "mask", "gram", "fisher"))

    def each(self, kind: str) -> list[Tensors]:
        """The files of every task."""
        return [load_file(self.folder / f"{kind}-{i}.safetensors") for i in range(self.settings["tasks"])]

    def model(self, task: int | None = None) -> nn.Module:
        """The base, or the base plus a task vector."""
        model = Model({name: tensor.shape for name, tensor in self.base.items()})
        for name, layer in model.encoder.items():
            layer.weight.data = self.base[name] + (0 if task is None else self.tasks[task][name])
        return model

    def one_module(self, name: str) -> "Data":
        """The same with one module only: some peers select entries over the whole model, we over each tensor."""
        part = object.__new__(Data)
        part.folder, part.settings, part.inputs = self.folder, self.settings, self.inputs
        part.base = {name: self.base[name]}
        for kind in ("tasks", "masks", "grams", "fishers"):
            setattr(part, kind, [{name: found[name]} for found in getattr(self, kind)])
        return part

    def pool(self) -> dict[str, nn.Module]:
        """fusion-bench's models by name."""
        models = {f"task_{i}": self.model(i) for i in range(len(self.tasks))}
        return {"_pretrained_": self.model()} | models

    def update(self, merged: nn.Module) -> Tensors:
        """merged − base."""
        return {name: merged.encoder[name].weight.detach() - weight for name, weight in self.base.items()}

    def kept(self, density: float, size: int) -> float:
        """The share that makes int(share·size) + 1 the number we keep, int(density·size)."""
        return (int(density * size) - 0.5) / size


class Model(nn.Module):
    """Linear layers without bias, tanh between them; named so that every peer takes them for weights to merge."""

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        super().__init__()
        layers = {name: nn.Linear(columns, rows, bias=False) for name, (rows, columns) in shapes.items()}
        self.encoder = nn.ModuleDict(layers).double()

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        first, *rest = self.encoder.values()
        x = first(x)
        for layer in rest:
            x = layer(torch.tanh(x))
        return x


def fusion_bench(data: Data) -> Iterator[tuple[str, Tensors]]:
    """Every method of fusion-bench 0.2.33 that pm_hf has too."""
    import fusion_bench
    from fusion_bench.method.dare.task_arithmetic import DareTaskArithmetic
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    from fusion_bench.method.magmax.magmax import MagMaxAlgorithm
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.simple_average import simple_average
    from fusion_bench.method.task_arithmetic.task_arithmetic import TaskArithmeticAlgorithm

    options, count = data.settings, len(data.tasks)
    pool = fusion_bench.BaseModelPool
    models = [data.model(i) for i in range(count)]
    yield "average", data.update(simple_average(models))
    scale = options["task_arithmetic"]
    yield "task_arithmetic", data.update(TaskArithmeticAlgorithm(scaling_factor=scale).run(pool(data.pool())))
    yield "magmax", data.update(MagMaxAlgorithm(scaling_factor=1.0).run(pool(data.pool())))
    # one random tensor for each parameter, model by model
    masks = [mask[name] for mask in data.masks for name in data.base]
    with patch("torch.rand_like", side_effect=[mask.double() * 2 - 0.5 for mask in masks]):
        drop = 1 - options["dare_density"]
        algorithm = DareTaskArithmetic(scale, drop, only_on_linear_weights=False)
        yield "dare", data.update(algorithm.run(pool(data.pool())))
    yield "ties", {k: v for name in data.base for k, v in _fusion_ties(data.one_module(name), pool).items()}
    yield "ties, whole model", _fusion_ties(data, pool)
    yield "dare_ties", {k: v for name in data.base for k, v in _fusion_dare_ties(data.one_module(name), pool).items()}
    weights = {f"{name}.weight": [task[name] for task in data.tasks] for name in data.base}
    off_diagonal = 1 - options["shrinkage"]
    regmean = merging_with_regmean_weights(weights, data.grams, reduce_non_diagonal_ratio=off_diagonal)
    yield "lot", {name: regmean[f"{name}.weight"] for name in data.base}
    fishers = [{f"{name}.weight": fisher[name] for name in data.base} for fisher in data.fishers]
    equal = torch.ones(count, dtype=torch.float64)
    fisher_mean = merging_with_fisher_weights(
        weights, fishers, equal, normalize_fisher_weight=False, minimal_fisher_weight=0
    )
    yield "cofima", {name: fisher_mean[f"{name}.weight"] for name in data.base}
    yield "opcm", _fusion_opcm(data, pool)
    yield "doge", _fusion_doge(data, pool)
    yield from _fusion_adamerging(data, pool)


def _fusion_ties(data: Data, pool) -> Tensors:
    from fusion_bench.method.ties_merging.ties_merging import TiesMergingAlgorithm

    share = data.kept(data.settings["ties_density"], sum(weight.numel() for weight in data.base.values()))
    algorithm = TiesMergingAlgorithm(scaling_factor=1.0, threshold=share, remove_keys=[], merge_func="mean")
    return data.update(algorithm.run(pool(data.pool())))


def _fusion_dare_ties(data: Data, pool) -> Tensors:
    from fusion_bench.method.dare.ties_merging import DareTiesMerging

    (name,) = data.base
    share = data.kept(1.0, data.base[name].numel())  # it trims after the drop as well: keep everything
    with patch("torch.rand_like", side_effect=[mask[name].double() * 2 - 0.5 for mask in data.masks]):
        algorithm = DareTiesMerging(1 - data.settings["dare_density"], False, True, 1.0, share, [], "mean")
        return data.update(algorithm.run(pool(data.pool())))


def _fusion_opcm(data: Data, pool) -> Tensors:
    from fusion_bench.method.opcm.opcm import OPCMForCLIP

    algorithm = OPCMForCLIP(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    algorithm._program = SimpleNamespace(taskpool=SimpleNamespace(_test_datasets={}), config={})
    return data.update(algorithm.run(pool(data.pool())))


def _fusion_doge(data: Data, pool) -> Tensors:
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm

    size = sum(weight.numel() for weight in data.base.values())
    share = data.kept(data.settings["doge_keep"], size)
    with patch("torch.cuda.memory_allocated", return_value=0):
        return data.update(DOGE_TA_Algorithm(subspace=6, K=share, lamda=0.07).run(pool(data.pool())))


def _fusion_adamerging(data: Data, pool) -> Iterator[tuple[str, Tensors]]:
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from omegaconf import OmegaConf

    class Learner(LayerWiseAdaMergingAlgorithm):
        """Its loop on our inputs, the same batch of a task at every step."""

        def get_shuffled_test_loader_iter(self, task: str):
            return iter([(data.inputs[task],)])

        def compute_logits(self, module, images, task):
            return module(images)

        def log_hyperparams(self, *args, **kwargs):
            """It needs a logger."""

    options = data.settings
    config = {"name": "adamerging", "weights": None, "init_values": 0.3, "clamp_weights": False, "tie_weights": False}
    config |= {"strict": True, "optimizer": "adam", "lr": options["learning_rate"], "max_steps": options["steps"]}
    config |= {"save_merging_weights": False, "fast_dev_run": False}
    yield "adamerging", data.update(Learner(OmegaConf.create(config)).run(pool(data.pool())))


def mergekit(data: Data) -> Iterator[tuple[str, Tensors]]:
    """Every method of mergekit 0.1.5 that pm_hf has too."""
    options = data.settings
    equal, unequal = [1.0] * len(data.tasks), options["weights"]
    scaled, density = [options["task_arithmetic"]] * len(data.tasks), options["dare_density"]
    trim = {"density": options["ties_density"]}
    drop = {"density": density, "rescale": False, "lambda": 1 / density}
    yield "average", _mergekit(data, "linear", equal)
    yield "task_arithmetic", _mergekit(data, "task_arithmetic", scaled)
    yield "ties", _mergekit(data, "ties", equal, **trim)
    yield "ties, unequal weights", _mergekit(data, "ties", unequal, **trim)
    yield "dare", _mergekit(data, "dare_linear", scaled, **drop)
    yield "dare, its own rescaling", _mergekit(data, "dare_linear", scaled, density=density)
    yield "dare_ties", _mergekit(data, "dare_ties", equal, normalize=True, **drop)


def _mergekit(data: Data, method: str, weights: list[float], **parameters: object) -> Tensors:
    """merged − base; random masks are ours, module by module and in each task by task."""
    from mergekit.merge_methods import merge_state_dicts

    tasks = {f"task_{i}": {n: w + task[n] for n, w in data.base.items()} for i, task in enumerate(data.tasks)}
    models = tasks if method == "linear" else {"base": data.base} | tasks
    masks = [mask[name].double() for name in data.base for mask in data.masks]
    with patch("torch.bernoulli", side_effect=masks):
        merged = merge_state_dicts(
            models,
            method,
            parameters={"weight": dict(zip(tasks, weights, strict=True))} | parameters,
            base=None if method == "linear" else "base",
        )
    return {name: merged[name] - weight for name, weight in data.base.items()}


def main() -> int:
    """Run one peer."""
    peer, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    data = Data(folder)
    (folder / peer).mkdir()
    for method, update in {"fusion-bench": fusion_bench, "mergekit": mergekit}[peer](data):
        save_file(
            {name: tensor.contiguous() for name, tensor in update.items()}, folder / peer / f"{method}.safetensors"
        )
    packages = {name: version(name) for name in (peer, "torch", "transformers")}
    (folder / peer / "versions.json").write_text(json.dumps(packages), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

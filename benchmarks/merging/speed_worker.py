"""One measurement of merge_speed.py, in a process of its own.

python speed_worker.py TASK, a JSON object with what, folder, shape, dtype, rank, layers and modules. Prints a
line with RssAnon after the imports, then a line with the result: seconds of the work alone, VmHWM, and what belongs to
the measurement.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Result = dict[str, object]
PREFIX = "base_model.model."


class Task:
    """What merge_speed.py asked for."""

    def __init__(self, text: str) -> None:
        given = json.loads(text)
        self.what, self.rank, self.folder = given["what"], given["rank"], Path(given["folder"])
        self.shape, self.dtype = given["shape"], getattr(torch, given["dtype"])
        self.layers, self.sizes = given["layers"], {k: tuple(v) for k, v in given["modules"].items()}
        self.adapters = [self.folder / f"{self.shape}-adapter-{i}" for i in (0, 1)]

    def modules(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(name, (out, in)) of every adapted matrix."""
        for layer in range(self.layers):
            for name, size in self.sizes.items():
                yield f"layers.{layer}.{name}", size

    def facts(self) -> Result:
        """What the table needs of the adapters."""
        mb = sum((path / "adapter_model.safetensors").stat().st_size for path in self.adapters) / 1e6
        size = "×".join(map(str, next(iter(self.sizes.values()))))
        return {"adapters_mb": mb, "matrices": self.layers * len(self.sizes), "size": size}


def make(task: Task) -> Result:
    """Two random adapters."""
    ready()
    for seed, path in enumerate(task.adapters):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for name, (out, columns) in task.modules():
            A = torch.randn(task.rank, columns, generator=generator) / columns**0.5
            tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to(task.dtype)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out, task.rank, generator=generator).to(task.dtype)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "r": task.rank, "lora_alpha": 2 * task.rank, "base_model_name_or_path": "speed"}
        config |= {"target_modules": list(task.sizes)}
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return {"seconds": 0.0}


def ours(task: Task) -> Result:
    """merge_adapters, exact or compressed to the rank of one adapter."""
    from pm_hf.adapters.merge import merge_adapters

    ready()
    output, rank = task.folder / "ours", task.rank if task.what == "ours compressed" else None
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    report = merge_adapters(task.adapters, output, method="average", weights=[0.3, 0.7], max_rank=rank)
    seconds = time.perf_counter() - start
    return task.facts() | {"seconds": seconds} | ({"error": report.error} if rank else {})


def disk(task: Task) -> Result:
    """Read both adapters and write a result of the size of ours: float32, both side by side."""
    output = task.folder / "disk.safetensors"
    output.unlink(missing_ok=True)
    ready()
    start = time.perf_counter()
    tensors: dict[str, torch.Tensor] = {}
    for i, path in enumerate(task.adapters):
        tensors |= {f"{name}.{i}": t.float() for name, t in load_file(path / "adapter_model.safetensors").items()}
    save_file(tensors, output)
    if task.what == "disk, synced":
        with open(output, "rb") as handle:
            os.fsync(handle.fileno())
    return {"seconds": time.perf_counter() - start}


def peft(task: Task) -> Result:
    """PEFT's add_weighted_adapter on bare Linear layers."""
    import peft

    model = bare_model(task)
    ready()
    start = time.perf_counter()
    model = peft.PeftModel.from_pretrained(model, task.adapters[0], adapter_name="a")
    model.load_adapter(task.adapters[1], adapter_name="b")
    loaded = time.perf_counter()
    svd = task.what == "PEFT svd"
    how = {"combination_type": "svd", "svd_rank": task.rank} if svd else {"combination_type": "cat"}
    with torch.no_grad():
        model.add_weighted_adapter(["a", "b"], [0.3, 0.7], "merged", **how)
    merged = time.perf_counter()
    model.save_pretrained(task.folder / "peft", selected_adapters=["merged"])
    times = {"seconds": merged - loaded, "load_seconds": loaded - start, "save_seconds": time.perf_counter() - merged}
    if svd:
        _, times["error"] = approximation(task, task.folder / "peft" / "merged")
    return task.facts() | times


def bare_model(task: Task) -> torch.nn.Module:
    """Linear layers in the adapters' names; their weights are allocated, never written."""
    root = torch.nn.Module()
    root.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(task.layers))
    for layer in root.layers:
        for name, (out, columns) in task.sizes.items():
            layer.add_module(name, torch.nn.utils.skip_init(torch.nn.Linear, columns, out, bias=False))
    return root


def difference(task: Task) -> Result:
    """Largest relative difference of the singular values that PEFT svd and ours keep of one layer."""
    ready()
    ours, peft = (approximation(task, task.folder / name)[0] for name in ("ours", "peft/merged"))
    return {"seconds": 0.0, "singular_values": float(((ours - peft) / peft).abs().max())}


def approximation(task: Task, folder: Path) -> tuple[torch.Tensor, float]:
    """(singular values of a merged layer, its relative error against 0.3·Δ₁ + 0.7·Δ₂), in float64."""
    name = next(task.modules())[0]
    parts = [(factors(path, name), 2 * weight) for path, weight in zip(task.adapters, (0.3, 0.7), strict=True)]
    B, A = factors(folder, name)
    left, right = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    exact = (torch.cat([weight * b for (b, _), weight in parts], dim=1), torch.cat([a for (_, a), _ in parts]))
    gap = norm(torch.cat([exact[0], -B], dim=1), torch.cat([exact[1], A]))
    return torch.linalg.svdvals(left @ right.T), gap / norm(*exact)


def factors(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_B, lora_A) of a module in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    B, A = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "BA")
    return B, A


def norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """‖BA‖ by its QR cores."""
    return float(torch.linalg.norm(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T))


def make_fisher(task: Task) -> Result:
    """A curvature file of two tasks for the second adapter: one random S and M of a module, written for every module.

    Data are written straight into the file: the sums of a 7B shape need not fit into memory.
    """
    from pm_hf.adapters.folder import open_adapter
    from pm_hf.merging.curvature import CURVATURE_FORMAT, delta_probe, quadratic_forms

    ready()
    delta = open_adapter(task.adapters[1]).products()
    tiles = {size: torch.rand(size, generator=torch.Generator().manual_seed(0)) for size in set(task.sizes.values())}
    names = [name for name, _ in task.modules()]
    whole = {n: quadratic_forms("fisher", {"S": tiles[s]}, "S", delta[n], [delta[n]])[0] for n, s in task.modules()}
    header = {"settings": {}, "owner": {}, "examples": [8, 8], "current": {n: 0.3 * x for n, x in whole.items()}}
    header |= {"delta_norm": {n: delta[n].norm() for n in names}, "probe": {n: delta_probe(n, delta[n]) for n in names}}
    stored, offset = {"__metadata__": {"format": CURVATURE_FORMAT, "curvature": json.dumps(header)}}, 0
    kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[task.dtype]
    for name, size in task.modules():
        for part in "SM":
            end = offset + tiles[size].numel() * task.dtype.itemsize
            stored[f"{part}.{name}"] = {"dtype": kind, "shape": size, "data_offsets": [offset, end]}  # type: ignore[dict-item]
            offset = end
    text = json.dumps(stored).encode()
    text += b" " * (-len(text) % 8)
    data = {size: tile.to(task.dtype).view(torch.uint8).numpy().data for size, tile in tiles.items()}
    with open(task.folder / f"{task.shape}-fisher.safetensors", "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for _, size in task.modules():
            for _ in "SM":
                handle.write(data[size])
    return {"seconds": 0.0}


def fisher(task: Task) -> Result:
    """A fold of the second adapter into the first with the optimal coefficient, exact."""
    from pm_hf.adapters.merge import merge_adapters

    ready()
    file, output = task.folder / f"{task.shape}-fisher.safetensors", task.folder / "folded"
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    report = merge_adapters(task.adapters[1], output, into=task.adapters[0], curvature=file)
    seconds = time.perf_counter() - start
    assert report.coefficient is not None
    assert report.coefficient.raw > 0
    largest = max(out * columns for out, columns in task.sizes.values())
    module = 2 * largest * task.dtype.itemsize / 1e6
    return task.facts() | {"seconds": seconds, "file_mb": file.stat().st_size / 1e6, "module_mb": module}


def mergekit(task: Task) -> Result:
    """mergekit's linear merge of dense weights, files read and written; its result is dense, no adapter."""
    from mergekit.merge_methods import merge_state_dicts

    models = [task.folder / f"{task.shape}-dense-{i}.safetensors" for i in (0, 1)]
    for path, adapter in zip(models, task.adapters, strict=True):
        dense = {}
        for name, _ in task.modules():
            B, A = factors(adapter, name)
            dense[f"{name}.weight"] = (2 * B @ A).float()
        save_file(dense, path)
    del dense
    ready()
    start = time.perf_counter()
    merged = merge_state_dicts([load_file(path) for path in models], "linear", parameters={"weight": [0.3, 0.7]})
    save_file(merged, task.folder / "mergekit.safetensors")
    seconds = time.perf_counter() - start
    for path in (*models, task.folder / "mergekit.safetensors"):
        path.unlink()
    return {"seconds": seconds, "note": "dense weights in and out, made from the adapters; its result is no adapter"}


def ready() -> None:
    """Say what the imports took."""
    print(json.dumps({"base_mb": status_mb("RssAnon")}), flush=True)


def status_mb(field: str) -> float:
    """A field of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


WORK: dict[str, Callable[[Task], Result]] = {
    "make": make,
    "ours exact": ours,
    "ours compressed": ours,
    "disk": disk,
    "disk, synced": disk,
    "PEFT cat": peft,
    "PEFT svd": peft,
    "difference": difference,
    "make fisher": make_fisher,
    "ours, Fisher fold": fisher,
    "mergekit linear": mergekit,
}


def main() -> int:
    """Do one task."""
    task = Task(sys.argv[1])
    result = WORK[task.what](task)
    print(json.dumps(result | {"hwm_mb": status_mb("VmHWM")}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

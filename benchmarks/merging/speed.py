"""Time and memory of merge_adapters beside PEFT, mergekit and the disk, all in one run: results/merging/speed.*

python benchmarks/merging/speed.py [--quick] [--mergekit PYTHON] [--no-results]

Two random adapters of rank 16 in the shapes of ViT-B, a 1B and a 7B model. Every number comes from a process of its own
(the median of several), timed around the call alone; memory is its RssAnon, read every 2 ms from outside, above what it
had after its imports, and VmHWM. "disk" reads both adapters with safetensors and writes a result of the size of ours,
synced or not. PEFT gets a model of bare Linear layers whose weights are never touched, so they take no memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "merging"
WORKER = Path(__file__).with_name("speed_worker.py")
RANK, LIMIT_MB = 16, 300
SHAPES: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {  # layers, {module: (out, in)}
    "ViT-B": (12, {"query": (768, 768), "value": (768, 768)}),
    "1B": (16, {"q_proj": (2048, 2048), "v_proj": (512, 2048)}),
    "7B": (32, {"q_proj": (4096, 4096), "v_proj": (4096, 4096)}),
    "one layer": (1, {"q_proj": (4096, 4096)}),
}
QUICK: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "ViT-B": (2, {"query": (96, 96), "value": (96, 96)}),
    "7B": (2, {"q_proj": (512, 512), "v_proj": (512, 512)}),
    "one layer": (1, {"q_proj": (512, 512)}),
}
Row = dict[str, Any]


def main() -> int:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--mergekit", help="interpreter of an environment with mergekit")
    parser.add_argument("--no-results", action="store_true", help="print only")
    options = parser.parse_args()
    shapes, rows = QUICK if options.quick else SHAPES, []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), shapes, repeats=2 if options.quick else 5)
        for shape in shapes:
            for dtype in ("bfloat16", "float32"):  # the last one stays for PEFT
                rows += bench.adapters(shape, dtype)
            rows += bench.peft(shape, options.quick)
            if options.mergekit and shape != "7B":
                rows.append(bench.row(shape, "float32", "mergekit linear", python=options.mergekit, repeats=1))
        for dtype in ("float32", "bfloat16"):
            rows.append(bench.fisher("7B", dtype))
    text = table(rows) + "\n" + "\n".join(targets(rows)) + "\n"
    print(text)
    if not options.no_results:
        sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
        from environment import environment

        from pm_hf.files import write_json

        RESULTS.mkdir(parents=True, exist_ok=True)
        name = "speed-quick" if options.quick else "speed"
        write_json(
            RESULTS / f"{name}.json", {"rows": rows, "load": [load, os.getloadavg()[0]], "rank": RANK, **environment()}
        )
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    return 0


class Bench:
    """A temporary folder, and measurements in processes of their own."""

    def __init__(self, folder: Path, shapes: Mapping, repeats: int) -> None:
        self.folder, self.shapes, self.repeats = folder, shapes, repeats

    def adapters(self, shape: str, dtype: str) -> list[Row]:
        """Make two adapters; ours exact and compressed, and the disk."""
        self.run("make", shape, dtype)
        rows = [self.row(shape, dtype, what) for what in ("ours exact", "disk, synced", "disk", "ours compressed")]
        exact, disk, unsynced, _ = rows
        exact["of disk, synced"] = ratio(exact, disk)
        exact["of disk"] = ratio(exact, unsynced)
        return rows

    def peft(self, shape: str, quick: bool) -> list[Row]:
        """PEFT's cat of the whole model, and its svd of one layer."""
        rows = [self.row(shape, "float32", "PEFT cat", repeats=3)]
        if shape == "one layer":
            rows.append(self.row(shape, "float32", "PEFT svd", repeats=1))
            rows.append(self.row(shape, "float32", "difference", repeats=1))
        return rows

    def fisher(self, shape: str, dtype: str) -> Row:
        """A fold with the optimal coefficient of a diagonal Fisher that lies on disk."""
        self.run("make", shape, "float32")
        self.run("make fisher", shape, dtype)
        row = self.row(shape, dtype, "ours, Fisher fold", repeats=2)
        (self.folder / f"{shape}-fisher.safetensors").unlink()
        return row

    def row(
        self, shape: str, dtype: str, what: str, *, repeats: int | None = None, python: str = sys.executable
    ) -> Row:
        """The median time of several processes, and the largest of their peaks."""
        measured = [self.run(what, shape, dtype, python) for _ in range(repeats or self.repeats)]
        seconds = [process.pop("seconds") for process in measured]
        peaks = {key: max(process[key] for process in measured) for key in ("base_mb", "peak_mb", "hwm_mb")}
        increase = max(process["peak_mb"] - process["base_mb"] for process in measured)
        times = {"seconds": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
        return {"shape": shape, "dtype": dtype, "what": what} | measured[-1] | times | peaks | {"increase_mb": increase}

    def run(self, what: str, shape: str, dtype: str, python: str = sys.executable) -> Row:
        """One process: what it prints, and its peak of RssAnon after its imports."""
        layers, modules = self.shapes[shape]
        task = {"what": what, "folder": str(self.folder), "shape": shape, "dtype": dtype, "rank": RANK}
        task |= {"layers": layers, "modules": modules}
        command = [python, str(WORKER), json.dumps(task)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment |= {"PYTHONPATH": str(ROOT)} if python == sys.executable else {}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        base, peak = json.loads(process.stdout.readline() or "{}").get("base_mb", 0.0), 0.0
        while process.poll() is None:
            peak = max(peak, status_mb(process.pid, "RssAnon"))
            time.sleep(0.002)
        lines = process.stdout.read().splitlines()
        if process.returncode:
            raise SystemExit(f"{what} ({shape}, {dtype}) failed")
        return {"base_mb": base, "peak_mb": max(peak, base)} | json.loads(lines[-1])


def status_mb(pid: int, field: str) -> float:
    """A field of /proc/PID/status in MB; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 / 1e6 if values else 0.0


def ratio(row: Row, other: Row) -> float:
    """Time of one over time of the other."""
    return row["seconds"] / other["seconds"]


def table(rows: list[Row]) -> str:
    """One line for each measurement, as Markdown."""
    head = "| shape | stored | what | seconds (fastest – slowest) | RssAnon above imports, peak | VmHWM | remarks |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["what"] == "difference":
            continue
        seconds = f"{row['seconds']:.3g} ({row['fastest']:.3g} – {row['slowest']:.3g})"
        memory = f"{row['increase_mb']:.0f} MB, {row['peak_mb']:.0f} MB | {row['hwm_mb']:.0f} MB"
        lines.append(f"| {row['shape']} | {row['dtype']} | {row['what']} | {seconds} | {memory} | {remarks(row)} |")
    return "\n".join(lines) + "\n"


def remarks(row: Row) -> str:
    """What else was measured."""
    remarks = [f"{row[key]:.2f}× {key.removeprefix('of ')}" for key in ("of disk, synced", "of disk") if key in row]
    if "error" in row:
        remarks.append(f"error {row['error']:.4g}")
    if "load_seconds" in row:
        remarks.append(f"loading {row['load_seconds']:.2g} s and saving {row['save_seconds']:.2g} s not counted")
    if "note" in row:
        remarks.append(row["note"])
    return "; ".join(remarks)


def targets(rows: list[Row]) -> list[str]:
    """The targets of issue 3, each with pass or MISS."""
    by = {(row["shape"], row["dtype"], row["what"]): row for row in rows}
    lines = []

    def line(text: str, good: bool) -> None:
        lines.append(f"- {'pass' if good else 'MISS'}: {text}")

    ours, svd = by["one layer", "float32", "ours compressed"], by["one layer", "float32", "PEFT svd"]
    gap, speed = by["one layer", "float32", "difference"], ratio(svd, ours)
    out, columns = (int(side) for side in svd["size"].split("×"))
    line(
        f"one {out}×{columns} layer, rank 16 + 16 to 16: {speed:.0f}× the speed of PEFT svd (target 100), errors "
        f"{ours['error']:.6f} and {svd['error']:.6f}, singular values within {gap['singular_values']:.1e}",
        speed >= 100 and abs(ours["error"] - svd["error"]) < 1e-5,
    )
    layers = by["7B", "float32", "ours exact"]["matrices"]
    lines.append(f"  (extrapolated: {layers} such layers take PEFT {svd['seconds'] * layers / 60:.0f} minutes)")
    for dtype in ("float32", "bfloat16"):
        whole = by["7B", dtype, "ours compressed"]
        line(f"7B compressed, {dtype}: {whole['seconds']:.2f} s (target 20)", whole["seconds"] < 20)
    for (shape, dtype, what), row in by.items():
        if what == "ours exact":
            share = row["of disk, synced"]
            line(f"{shape} exact, {dtype}: {share:.2f}× reading and writing as much, synced (target 2)", share <= 2)
        if not what.startswith("ours"):
            continue
        limit = row["adapters_mb"] + row.get("module_mb", 0) + LIMIT_MB
        memory = f"{row['peak_mb']:.0f} MB in all (target {limit:.0f}), {row['increase_mb']:.0f} MB above imports"
        text = f"{shape} {what.removeprefix('ours').strip(', ')}, {dtype}: {memory}"
        if "file_mb" in row:
            text += f", {row['seconds']:.1f} s for a file of {row['file_mb']:.0f} MB"
        line(text, row["peak_mb"] <= limit)
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""The tables and pictures of what the suite left in results/streams/STREAM/METHOD-seedK.json."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean, stdev

from environment import ROOT
from grid import ANSWERS, LANGUAGE_NAMES, NAMES, STREAMS
from scipy.stats import binomtest, ttest_rel
from scipy.stats import t as student

from pm_hf.reports.run_charts import plot_means
from pm_hf.runs.records import Report, read_right
from pm_hf.runs.right_rows import discordant, paired_difference, same_rows

BLOCK = re.compile(r"(<!-- (\S+) -->\n\n).*?(<!-- end -->)", re.S)
OVERVIEW = (
    "clinc150",
    "banking77",
    "ten-sets",
    "four-sets",
    "pacs",
    "tiny-imagenet-50",
    "cifar10",
)  # judged by accuracy
REHEARSAL = ("replay", "individual", "joint", "joint_lda")  # see old data, or do not make one model


def result_path(name: str, method: str, seed: int) -> Path:
    """The file of one result."""
    return ROOT / "results" / "streams" / name / f"{method}-seed{seed}.json"


def results(name: str, method: str) -> dict[int, dict]:
    """The results of one method by seed."""
    folder = result_path(name, method, 0).parent
    seeds = sorted(int(path.stem.rpartition("seed")[2]) for path in folder.glob(f"{method}-seed*.json"))
    return {seed: json.loads(result_path(name, method, seed).read_text(encoding="utf-8")) for seed in seeds}


def write(name: str) -> str:
    """Write table.md and methods.png of one stream; the table."""
    text, folder = table(name), ROOT / "results" / "streams" / name
    (folder / "table.md").write_text(text, encoding="utf-8")
    picture(name)
    return text


def write_readme() -> None:
    """Put the tables as they are now into results/README.md."""
    readme = ROOT / "results" / "README.md"
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(text: str) -> str:
    """A text with every block `<!-- NAME --> … <!-- end -->` filled: the overview, or a table file of results/."""

    def filled(block: re.Match) -> str:
        start, name, end = block.groups()
        rows = overview() if name == "overview" else (ROOT / "results" / name).read_text(encoding="utf-8")
        return f"{start}{rows}\n{end}"

    return BLOCK.sub(filled, text)


def table(name: str) -> str:
    """Mean ± spread over the seeds of every method in results/, as Markdown.

    minus P&M, minus joint: mean difference of the seeds that both have, with the p of a paired t test where there are
    two or more. minus control: the same beside the frozen backbone, with its standard error by the test rows and the p
    of McNemar's exact test over the rows of all seeds, where the results say which rows were right.
    """
    stream = STREAMS[name]
    by_method = {method: results(name, method) for method in NAMES}
    titles = NAMES | (LANGUAGE_NAMES if dict(stream.columns) == ANSWERS else {})
    (first, key), *_ = stream.columns
    head = ["method", "orders" if stream.orders else "seeds", *(title for title, _ in stream.columns)]
    head += [f"{first}: minus P&M", "minus joint", "minus control, by rows"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in (method for method in NAMES if by_method[method]):
        columns = [[value(result, of) for result in by_method[method].values()] for _, of in stream.columns]
        cells = [spread(column, interval=stream.orders) for column in columns]
        for rival in ("pm", "joint"):
            pairs = paired(by_method[method], by_method[rival], key)
            cells.append("" if method == rival else difference(pairs, interval=stream.orders))
        cells.append("" if method == "frozen" else by_rows(by_method[method], by_method["frozen"]))
        lines.append(f"| {titles[method]} | {len(by_method[method])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def overview() -> str:
    """ACC of every method on every stream that is judged by accuracy, mean ± standard deviation; as Markdown.

    The best method that keeps no rows of old tasks is bold in each column, if it has two seeds or more.
    """
    shown = [name for name in OVERVIEW if any(results(name, method) for method in NAMES)]
    columns = {
        method: [[value(result, "ACC") for result in results(name, method).values()] for name in shown]
        for method in NAMES
    }
    tops = [max((_mean(columns[m][i]) for m in NAMES if m not in REHEARSAL), default=-1.0) for i in range(len(shown))]
    head = ["method", *(STREAMS[name].title for name in shown)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in (method for method in NAMES if sum(map(bool, columns[method])) >= 2):
        cells = [spread(column, interval=False) if column else "–" for column in columns[method]]
        bold = [method not in REHEARSAL and _mean(c) == top for c, top in zip(columns[method], tops, strict=True)]
        several = [len(column) > 1 for column in columns[method]]
        cells = [f"**{c}**" if best and two else c for c, best, two in zip(cells, bold, several, strict=True)]
        lines.append(f"| {NAMES[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(column: Sequence[float | None]) -> float:
    known = [x for x in column if x is not None]
    return fmean(known) if known else -1.0


def value(result: Mapping, key: str) -> float | None:
    """A metric of the stream, or the mean over tasks of another one at the end."""
    if key in ("held_out", "held_out_change"):
        return held_out(result, change=key == "held_out_change")
    metrics = result["metrics"]
    if key == "task_incremental":
        return metrics[key]["ACC"]
    return metrics[key] if key in metrics else metrics["final"].get(key)


def held_out(result: Mapping, *, change: bool) -> float | None:
    """Bits per byte of the texts that are never trained on, at the end, or their change against the base in percent:
    the mean over texts; None where there are none, or where the base was not scored."""
    ends = {text: scores["bits_per_byte"] for text, scores in (result.get("held_out") or [{}])[-1].items()}
    if change:
        base = {text: scores["bits_per_byte"] for text, scores in (result.get("untouched") or {}).items()}
        ends = {text: 100 * (bits / base[text] - 1) for text, bits in ends.items() if text in base}
    return fmean(ends.values()) if ends else None


def paired(ours: Mapping[int, dict], theirs: Mapping[int, dict], key: str) -> list[tuple[float, float]]:
    """A metric of both in each seed that both have."""
    pairs = [(value(ours[seed], key), value(theirs[seed], key)) for seed in sorted(ours.keys() & theirs.keys())]
    return [(our, their) for our, their in pairs if our is not None and their is not None]


def difference(pairs: Sequence[tuple[float, float]], *, interval: bool) -> str:
    """Mean difference ± spread, and the p of a paired t test where that is defined."""
    if not pairs:
        return "–"
    gaps = [our - their for our, their in pairs]
    shown = spread(gaps, interval=interval, sign="+")
    if len(gaps) < 2 or stdev(gaps) == 0:
        return shown
    p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return f"{shown} ({_p(p)})"


def by_rows(ours: Mapping[int, dict], theirs: Mapping[int, dict]) -> str:
    """Mean difference of the seeds whose results say which test rows were right, ± its standard error from the paired
    rows, and the p of McNemar's exact test over all of them."""
    known = [(read_right(ours[seed]), read_right(theirs[seed])) for seed in sorted(ours.keys() & theirs.keys())]
    known = [(left, right) for left, right in known if same_rows(left, right)]
    if not known:
        return "–"
    gaps, errors = zip(*(paired_difference(left, right) for left, right in known), strict=True)
    error = sum(of_seed**2 for of_seed in errors) ** 0.5 / len(errors)
    first, second = (sum(counts) for counts in zip(*(discordant(*pair) for pair in known), strict=True))
    p = float(binomtest(first, first + second).pvalue) if first + second else 1.0
    return f"{fmean(gaps):+.3f} ± {error:.3f} ({_p(p)})"


def _p(p: float) -> str:
    return f"p {p:.3f}" if p >= 0.001 else "p < 0.001"


def spread(values: Sequence[float | None], *, interval: bool, sign: str = "") -> str:
    """Mean ± standard deviation, or ± half-width of the 95 % t interval; of one value: the value."""
    known = [x for x in values if x is not None]
    if len(known) < 2:
        return f"{known[0]:{sign}.3f}" if known else "–"
    factor = float(student.ppf(0.975, len(known) - 1)) / len(known) ** 0.5 if interval else 1.0
    return f"{fmean(known):{sign}.3f} ± {factor * stdev(known):.3f}"


def picture(name: str) -> None:
    """methods.png: mean score on the tasks seen after each task, first seed of every method that has more than one."""
    reports = []
    for method in NAMES:
        for result in list(results(name, method).values())[:1]:
            if len(result["scores"]) < len(result["scores"][0]):
                continue
            scores = {"class_incremental": result["scores"], "task_incremental": result["task_incremental"]}
            known = {
                "metric": "class_incremental",
                "matrices": scores,
                "alphas": [],
            } | result  # results of before 0.2 name neither
            names = [field.name for field in fields(Report) if field.name != "folder"]
            reports.append(Report(folder=ROOT, **{name: known[name] for name in names if name in known}))
    if reports:
        plot_means(reports, ROOT / "results" / "streams" / name / "methods.png")

"""The page: its numbers are the runs', and it needs nothing but itself."""

import json
import re
from html.parser import HTMLParser
from statistics import mean, stdev

import pytest
from helpers import edited_json, refusal
from helpers.records import HOSTILE, matrix, page_of, write_run

from pm_hf.cli import main
from pm_hf.measuring.metrics import task_forgetting
from pm_hf.reports.charts import Chart, Series, svg, ticks
from pm_hf.reports.page import write_report
from pm_hf.runs.records import read_runs

TASKS = [
    "news",
    "mail for $x_$",
    "a task with a very long name " * 4,
    HOSTILE,
]
VOID = {"meta", "link", "br", "img"}


class Reader(HTMLParser):
    """Tables as {caption: rows of texts}, ids, headings, tags and whatever could refer to something."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.ids, self.headings, self.tags, self.references = {}, [], [], [], []
        self.open, self.texts, self.row, self.rows, self.shares = [], [], [], [], []
        self.scopes, self.unfolded = [], []  # the latter: captions and headings outside of what is folded
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        self.references += [found[key] for key in ("href", "src", "xlink:href", "action", "data") if key in found]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th", "caption", "h1", "h2", "h3"):
            self.texts = []
        if tag == "th":
            self.scopes.append(found.get("scope"))
        if tag == "td":
            share = re.fullmatch(r"--v:([\d.]+)", found.get("style") or "")
            self.shares.append(share and float(share[1]))
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.row = []

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        text = "".join(self.texts).strip()
        if tag in ("caption", "h2") and "details" not in self.open:
            self.unfolded.append(text)
        if tag in ("td", "th"):
            self.row.append(text)
        elif tag == "tr":
            self.rows.append(self.row)
        elif tag == "caption":
            self.caption = text
        elif tag == "table":
            self.tables[self.caption] = self.rows
        elif tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), text))

    def table(self, start):
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return found


def read(*folders):
    """(page as text, read)."""
    text = page_of(read_runs(folders))
    return text, Reader(text)


def shown(value, digits=3):
    return "–" if value is None else f"{value:.{digits}f}"


@pytest.fixture
def runs(tmp_path):
    """Three runs of one stream: pm, a joint one, one with a gap."""
    R = matrix(4, 5)
    R[2][0] = None
    return [
        write_run(tmp_path / "pm", TASKS, seed=1),
        write_run(tmp_path / "joint", TASKS, "joint", 2, joint=True),
        write_run(tmp_path / "individual", TASKS, "individual", 3, R=R, lora={"r": 4}),
    ]


def scores(folder):
    return json.loads((folder / "report.json").read_text())["scores"]


def test_every_cell_of_the_matrices_is_the_runs_score(runs):
    _, found = read(*runs)
    for folder, label in zip(runs, ("pm", "joint", "individual"), strict=True):
        R = scores(folder)
        header, *rows = found.table(f"{label}: accuracy on each task")
        assert header == ["task", *(["all"] if label == "joint" else ["1", "2", "3", "4"])]
        assert [row[0] for row in rows] == [f"{i + 1} {task}".strip() for i, task in enumerate(TASKS)]
        assert [row[1:] for row in rows] == [[shown(row[i]) for row in R] for i in range(4)]
        inside = found.table(f"{label}: accuracy inside the task's own classes")[1:]
        expected = [[shown(None if row[i] is None else 1 - row[i] / 2) for row in R] for i in range(4)]
        assert [row[1:] for row in inside] == expected


def test_summary_and_each_task_at_the_end_are_side_by_side(runs):
    _, found = read(*runs)
    header, *rows = found.table("Mean accuracy over tasks")
    for row, folder in zip(rows, runs, strict=True):
        metrics = json.loads((folder / "report.json").read_text())["metrics"]
        assert row[1:5] == [shown(metrics[key]) for key in ("ACC", "AAA", "BWT", "forgetting")]
    assert [row[0] for row in rows] == ["pm", "joint", "individual"]
    assert [row[-1] for row in rows] == ["503", "500", "503"]
    _, *rows = found.table("Accuracy on each task at the end")
    assert [row[1:] for row in rows] == [[shown(scores(f)[-1][i]) for f in runs] for i in range(4)]
    _, *rows = found.table("Forgetting of each task")
    assert [row[1] for row in rows] == [*map(shown, task_forgetting(scores(runs[0])))]
    assert [row[2] for row in rows] == ["–"] * 4
    R = scores(runs[2])
    assert rows[0][3] == shown(max(R[0][0], R[1][0]) - R[3][0])  # the gap is left out


def test_coefficients_stand_beside_one_over_t(runs):
    _, found = read(*runs)
    header, *rows = found.table("Coefficient with which")
    assert header == ["task", "1/t", "pm", "joint", "individual"]
    assert [row[1:] for row in rows] == [
        ["1.000", "1.000", "1.000", "1.000"],
        ["0.500", "0.500 (raw 1.000)", "–", "0.500 (raw 1.000)"],
        ["0.333", "0.333", "–", "0.333"],
        ["0.250", "0.250", "–", "0.250"],
    ]


def test_costs_of_each_task_are_those_of_its_step(runs):
    _, found = read(*runs)
    header, *rows = found.table("pm: each task's mean training loss")
    assert header[1:] == ["loss", "steps", "factors", "truncation", "seconds", "ms a step", "peak MiB", "curvature MiB"]
    for index, row in enumerate(rows):
        assert row[1:3] == ["0.5000", "20"]
        assert sum(int(part.split(" × ")[0]) for part in row[3].split(", ")) == 20
        assert row[4:] == [f"{1e-3 * index:.2g}", f"{2 + index:.1f}", "10.0", str(500 + index), "1.00"]


@pytest.mark.parametrize("metric", ["class_incremental", "bits_per_byte"])
def test_the_best_score_has_the_strongest_colour_whichever_way_the_metric_runs(metric, tmp_path):
    write_run(tmp_path / "run", ["a", "b"], metric=metric, R=[[0.5, None], [0.75, 1.0]])
    text, found = read(tmp_path / "run")
    wanted = [1.0, 0.5, None, 0.0] if metric == "bits_per_byte" else [0.0, 0.5, None, 1.0]
    place = found.shares.index(next(share for share in found.shares if share is not None))
    assert found.shares[place : place + 4] == wanted
    worst, best = ("1.000", "0.500") if metric == "bits_per_byte" else ("0.500", "1.000")
    assert re.search(rf"{worst} \(worst\)<span[^>]*></span>\s*{best}\s+\(best\)", text)
    assert f"{'lower' if metric == 'bits_per_byte' else 'higher'} is better" in text
    assert found.table("Forgetting")[1][1] == ("0.250" if metric == "bits_per_byte" else "-0.250")


def test_coefficients_of_one_over_t_are_a_sentence_and_others_a_chart(runs):
    said = "<p>Coefficient of each task, and 1/t: 1/t for every task, so each merge is the mean of its tasks.</p>"
    assert said in read(*runs)[0]
    alphas = json.loads((runs[0] / "report.json").read_text())["coefficients"]
    edited_json(runs[0] / "report.json", coefficients=[alpha | {"used": 0.9} for alpha in alphas])
    text, found = read(*runs)
    assert said not in text
    assert (3, "Coefficient of each task, and 1/t") in found.headings


def test_only_the_answer_and_the_best_matrix_are_unfolded(runs):
    _, found = read(*runs)
    scored = {f.name: json.loads((f / "report.json").read_text())["metrics"]["ACC"] for f in runs if f.name != "joint"}
    best = max(scored, key=lambda name: scored[name])
    titles = ("Summary", "Mean accuracy over tasks", "Score matrices", f"{best}: accuracy on each task (row)", "Notes")
    unfolded = [text for text in found.unfolded if text]
    assert [text.startswith(title) for text, title in zip(unfolded, titles, strict=True)] == [True] * 5


def test_the_page_refers_to_nothing_outside_itself(runs):
    text, found = read(*runs)
    assert all(value == "data:," or value.startswith("#") for value in found.references)
    assert {value[1:] for value in found.references if value.startswith("#")} <= set(found.ids)
    assert "script" not in {tag for tag, _ in found.tags}
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [a["content"] for tag, a in found.tags if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_names_are_escaped_and_secrets_hidden(runs):
    text, _ = read(*runs)
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quotes&quot;" in text
    assert "hf_secret" not in text
    assert "training.hub_token" in text


def test_screen_readers_get_headings_in_order_scopes_captions_and_titles(runs):
    _, found = read(*runs)
    assert len(found.ids) == len(set(found.ids))
    levels = [level for level, _ in found.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert set(found.scopes) == {"row", "col"}
    drawn = [a for tag, a in found.tags if tag == "svg"]
    assert len(drawn) == 8
    for attributes in drawn:
        assert attributes["role"] == "img"
        assert set(attributes["aria-labelledby"].split()) <= set(found.ids)
    assert sum(tag == "table" for tag, _ in found.tags) == sum(tag == "caption" for tag, _ in found.tags)
    wide = [a for tag, a in found.tags if a.get("role") == "region"]
    assert wide
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in wide)


def test_settings_that_differ_are_named_first(runs):
    _, found = read(*runs)
    rows = found.table("Settings that differ")
    assert {row[0] for row in rows[1:]} == {"method", "seed", "lora.r"}
    assert {row[0] for row in found.table("All settings")[1:]} >= {"training.learning_rate", "training.hub_token"}


def test_seeds_of_one_method_are_one_row_and_one_line(tmp_path):
    folders = [write_run(tmp_path / f"{m}{s}", TASKS[:2], m, s, R=matrix(2, s)) for m in ("pm", "best") for s in (1, 2)]
    text, found = read(*folders)
    _, *rows = found.table("Mean accuracy over tasks")
    assert [row[0] for row in rows] == ["pm (2 seeds)", "best (2 seeds)"]
    values = [json.loads((folder / "report.json").read_text())["metrics"]["ACC"] for folder in folders]
    assert rows[0][1] == f"{mean(values[:2]):.3f} ± {stdev(values[:2]):.3f}"
    assert text.count("<strong>") == 4  # the best of each average
    assert "Further seeds" in text
    drawn = re.search(r"<h3>Mean score on the tasks seen</h3>.*?</figure>", text, flags=re.S)[0]
    assert drawn.count("<path") == 4  # two methods, in the chart and in its legend
    assert f"pm ({mean(values[:2]):.3f})" in drawn


def test_a_chart_whose_values_are_all_the_same_is_a_sentence(tmp_path):
    folder = write_run(tmp_path / "run", ["a", "b"])
    for path in folder.glob("task-*/step.json"):
        edited_json(path, merge_error=0.0)
    text, _ = read(folder)
    assert "<p>Truncation error of each merge: 0 throughout.</p>" in text
    assert "<h3>Truncation error" not in text
    write_report([folder])
    assert not list(folder.glob("plots/truncation*"))
    assert list(folder.glob("plots/time-of-each-task.svg"))


def test_the_lowest_score_has_a_colour_and_what_was_not_measured_a_hatch(tmp_path):
    folder = write_run(tmp_path / "run", ["a", "b"], R=[[0.5, None], [0.25, 0.75]])
    text, _ = read(folder)
    matrix_of_run = text[text.index("accuracy on each task (row)") :]
    assert '<td class="heat" style="--v:0.000">0.250</td>' in matrix_of_run
    assert '<td class="absent">–</td>' in matrix_of_run
    write_report([folder])
    drawn = (folder / "plots" / "matrix-1.svg").read_text()
    filled = re.findall(r'<rect class="heat" style="--v:([\d.]+)" fill="(#\w+)"', drawn)
    assert [float(share) for share, _ in filled] == pytest.approx([0.56, 0.12, 1.0])
    assert "#ffffff" not in {colour for _, colour in filled}
    assert len(re.findall('<line class="rule"', drawn)) == 1


def test_classes_that_were_confused_are_listed(tmp_path):
    folder = write_run(tmp_path / "run", ["a", "b"])
    edited_json(folder / "task-01-x" / "step.json", confusions=[["<lost>", "found", 3, 8]])
    _, found = read(folder)
    assert found.table("pm: classes that were confused most")[1] == ["<lost>", "found", "3", "8"]


def test_fifty_tasks_make_one_wide_table(tmp_path):
    write_run(tmp_path / "run", [f"task {i}" for i in range(50)])
    text, found = read(tmp_path / "run")
    rows = found.table("pm: accuracy on each task")
    assert {len(row) for row in rows} == {51}
    assert [[cell for cell in row[1:] if cell != "–"] for row in rows[1:]] == [
        [shown(row[i]) for row in scores(tmp_path / "run")[i:]] for i in range(50)
    ]
    assert len(text) < 1_000_000
    assert text.count('class="dot') < 1200


def test_one_task_and_a_report_file_alone_make_a_page(tmp_path):
    one = write_run(tmp_path / "one", ["only"])
    alone = one / "report.json"
    for path in (one, alone):
        _, found = read(path)
        assert found.table("pm: accuracy on each task")[1] == ["1 only", shown(scores(one)[0][0])]


def test_runs_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / str(i), ["a"], seed=seed) for i, seed in enumerate((1, 2, 2))]
    assert [run.label for run in read_runs(folders)] == ["pm, seed 1", "pm, seed 2 (2)", "pm, seed 2 (3)"]


def test_what_is_no_run_or_has_no_common_metric_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"method": "pm"}')
    message = refusal(read_runs, [tmp_path / "empty", tmp_path / "other.json"])
    assert "empty holds no report.json: expected the output_dir of a run" in message
    assert "other.json: it lacks seed, tasks, scores, metrics, coefficients" in message
    runs = [write_run(tmp_path / m, ["a"], metric=m) for m in ("class_incremental", "bits_per_byte")]
    assert main(["report", *map(str, runs)]) == 2
    assert "judged by class_incremental and bits_per_byte" in capsys.readouterr().err


def test_the_command_writes_the_page_and_its_plots(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out == f"written: {runs[0] / 'report.html'}\n"
    names = {path.name for path in (runs[0] / "plots").iterdir()}
    charts = ("score-after-each-task", "forgetting", "loss-1", "truncation-error-of-each-merge")
    assert {f"{name}.{kind}" for name in (*charts, "matrix-1") for kind in ("svg", "png")} <= names
    for path in (runs[0] / "plots").iterdir():
        assert path.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<"}[path.suffix])
    before = (runs[0] / "report.html").read_bytes()
    write_report([runs[0]])
    assert (runs[0] / "report.html").read_bytes() == before


def test_without_matplotlib_the_page_is_the_same(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("pm_hf.reports.page.importlib.util.find_spec", lambda name: None)
    path, notes = write_report(runs, tmp_path / "out" / "here")
    assert path.read_text(encoding="utf-8") == page_of(read_runs(runs))
    assert notes == ["no PNG: matplotlib is not installed (the extra plots)"]
    plots = path.parent / "plots"
    assert {plot.suffix for plot in plots.iterdir()} == {".svg"}
    assert (plots / "matrix-1.svg").is_file()


# charts


def test_points_of_a_chart_stand_where_their_values_are():
    chart = Chart("c", "T <b>", "x", "y", [Series("s", [0, 1, 2, 3], [0.0, 1.0, None, 0.5])], limits=(0, 1))
    text = svg(chart, "c", alone=True)
    circles = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="3.5"', text)][:3]
    (x0, y0), (x1, y1), (x3, y3) = circles
    assert (x3 - x0) == pytest.approx(3 * (x1 - x0), abs=0.2)
    assert y0 - y3 == pytest.approx((y0 - y1) / 2, abs=0.1)
    line = re.findall(r' d="(M[^"]+)"', text)[0]
    assert line.count("M") == 2  # the gap
    assert "T &lt;b&gt;" in text
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"')


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.92), (5e-7, 9e-7), (1234, 98765), (3.999, 4.001)])
def test_ticks_are_round_numbers_inside_the_axis(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 13
    assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in found)
    steps = {round((b - a) / (high - low), 9) for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) == 1

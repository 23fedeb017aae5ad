"""Nothing from a file of a run reaches the card, the page, a chart or the terminal as anything but text."""

import re
from xml.etree import ElementTree

import pytest
from helpers import edited_json
from helpers.records import finished_run, page_of, write_run

from pm_hf.cli import main
from pm_hf.reports.card import loading_lines, model_card
from pm_hf.reports.charts import svg
from pm_hf.reports.release import read_finished_run
from pm_hf.reports.run_charts import charts, plot_means
from pm_hf.runs.records import read_runs

HOSTILE = [
    "`x` | <img src=x onerror=alert(6)>",
    "``` \n```\n<script>alert(1)</script>",
    "[a](javascript:alert(1)) ![b](http://x/y) **c** _d_ ~~e~~ &lt; $f$ # g",
    "a\x1b[2J\x9b31m\x00\x08\u202e\ufeff\x7f",
    "a\n\n# heading\n\n- item\n\n| a | b |\n| --- | --- |",
    "$\\frac{$ \\ud800",
    "]]> --> </style></svg></title>",
]
ALLOWED = ("<details>", "</details>", "<summary>", "</summary>")


def outside_code(card):
    """The card's lines below its front matter that stand in no code block."""
    inside, lines = None, []
    for line in card.split("---\n", 2)[2].splitlines():
        fence = re.match("`{3,}", line)
        if inside is None and fence:
            inside = fence[0]
        elif inside is not None and line == inside:
            inside = None
        elif inside is None:
            lines.append(line)
    assert inside is None
    return lines


@pytest.fixture(params=range(len(HOSTILE)))
def hostile(request):
    return HOSTILE[request.param]


def test_the_card_shows_a_hostile_text_as_text(hostile, tmp_path):
    folder = finished_run(tmp_path / "run")
    edited_json(
        folder / "report.json",
        tasks=[hostile, "b"],
        notes=[hostile],
        method=hostile,
        scenario=hostile,
        versions={hostile: hostile},
    )
    (folder / "plots").mkdir()
    stem = hostile.replace("/", "").replace("\0", "")
    (folder / "plots" / f"{stem}.png").write_bytes(b"x")
    card = model_card(read_finished_run(folder, "owner/base"), "owner/name")
    spans = re.compile(r"(?<![\\`])(`+)(?!`).+?(?<!`)\1(?!`)")
    for line in outside_code(card):
        assert all(character.isprintable() for character in line)
        bare = re.sub(r"\\.", "", spans.sub("", line))  # what Markdown may take for markup
        for tag in ALLOWED:
            bare = bare.replace(tag, "")
        bare = re.sub(r"!\[[^][]*\]\(plots/[\w%.~-]+\)|\[\]\(https://huggingface.co/owner/base\)", "", bare)
        assert "<" not in bare.removeprefix(">"), line
        assert "`" not in bare, line
        assert "](" not in bare, line
    headings = [line for line in outside_code(card) if line.startswith("#")]
    assert len(headings) == len(set(headings)) <= 7


def test_a_setting_does_not_end_the_block_of_settings(tmp_path):
    folder = finished_run(tmp_path / "run", training={"run_name": "x\n```\n````\n# out"})
    card = model_card(read_finished_run(folder, "owner/base"), "owner/name")
    assert "# out" not in outside_code(card)
    assert "`````yaml" in card


def test_a_head_with_quotes_stays_in_its_text():
    lines = loading_lines("b", "f", 'x"]; import os; ["')
    assert '["x\\"]; import os; [\\""]' in lines
    compile(lines, "lines", "exec")


def test_page_and_charts_show_a_hostile_text_as_text(hostile, tmp_path):
    folder = write_run(tmp_path / "run", [hostile, "b"])
    edited_json(folder / "report.json", method=hostile, notes=[hostile], versions={hostile: hostile})
    runs = read_runs([folder])
    text = page_of(runs)
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "<script>" not in text
    assert "<img" not in text
    for chart in charts(runs):
        ElementTree.fromstring(svg(chart, chart.name, alone=True))


def test_a_picture_of_a_hostile_text_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "run", ["a", "b"])
    edited_json(folder / "report.json", method="$\\frac{$ \x1b$")
    plot_means(read_runs([folder]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_dry_run_of_a_push_prints_text(hostile, tmp_path, capsys):
    folder = finished_run(tmp_path / "run")
    edited_json(folder / "report.json", notes=[hostile])
    assert main(["push", str(folder), "owner/name", "--dry-run", "--base_model_id", "owner/base"]) == 0
    assert all(character.isprintable() or character == "\n" for character in capsys.readouterr().out)

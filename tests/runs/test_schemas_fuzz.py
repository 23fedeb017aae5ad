"""The fuzz of `make fuzz` in small: a damaged run gives what the whole one does, or is refused."""

from helpers.fuzz import REFUSED, RIGHT, few, judged, runs
from hypothesis import given


@few(25)
@given(runs.CASES)
def test_any_damage_is_refused_in_one_line_or_changes_nothing(case):
    assert judged(runs, case) in (RIGHT, REFUSED)

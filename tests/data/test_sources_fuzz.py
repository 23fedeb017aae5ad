"""The fuzz of `make fuzz` in small: rows are what the csv and json modules and pyarrow read, or refused."""

from helpers.fuzz import REFUSED, RIGHT, few, judged, rows
from hypothesis import given


@few(250)
@given(rows.CASES)
def test_any_file_is_its_rows_or_one_line(case):
    assert judged(rows, case) in (RIGHT, REFUSED)

"""The fuzz of `make fuzz` in small: settings are what was meant, or refused."""

from helpers.fuzz import REFUSED, RIGHT, few, judged, settings
from hypothesis import given


@few(100)
@given(settings.CASES)
def test_any_settings_are_what_was_meant_or_one_line(case):
    assert judged(settings, case) in (RIGHT, REFUSED)

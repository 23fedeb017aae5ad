"""Texts that come from files are safe to print."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pm_hf.errors import InputError
from pm_hf.text import JOINERS, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, 100 % · ümläut 漢字 😀", "plain text, 100 % · ümläut 漢字 😀"),
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("two\nlines\r\n", "two\\x0alines\\x0d\\x0a"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("a\u2066b\u2069\u200e\u061c", "a\\u2066b\\u2069\\u200e\\u061c"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("\x9b31m", "\\x9b31m"),  # one-byte form of an escape code
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("\U000e0041", "\\U000e0041"),  # a letter nobody sees
        ("caf\udce9", "caf\\udce9"),  # a file name that is not UTF-8
        ("می\u200cخواهم 👨\u200d👩", "می\u200cخواهم 👨\u200d👩"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_is_shown_instead(text, shown):
    assert printable(text) == shown
    assert str(InputError(f"{text}!")) == f"{shown}!"


@given(st.text(alphabet=st.characters()))
def test_every_text_is_one_printable_line_and_stays_so(text):
    shown = printable(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert not [c for c in shown if unicodedata.category(c)[0] == "C" and c not in JOINERS and ord(c) < 0xE000]
    assert printable(shown) == shown

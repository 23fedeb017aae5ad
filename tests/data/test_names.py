from pm_hf.data.names import look_alikes, look_alikes_in_words, meant, visible


def test_nothing_of_an_invisible_name_is_seen():
    assert not any(map(visible, ["", " \t\n", "\u00a0\u2003", "\u200b\u200d\ufeff\u00ad", "\0"]))
    assert all(map(visible, ["a", ".", "\N{ZERO WIDTH SPACE}a", "日", "🙂"]))


def test_look_alikes_differ_only_in_blanks_case_or_form():
    groups = [
        ["apple", "apple ", "Apple", "apple\u200b"],
        ["caf\u00e9", "cafe\u0301"],
        ["STRASSE", "straße"],
        ["a b", "ab"],
    ]
    mixed = ["pear", *(name for group in groups for name in group), "10", "1.0", "apple", "apples"]
    assert look_alikes(mixed) == groups


def test_groups_in_words_can_be_told_apart_and_are_few():
    assert look_alikes_in_words(["caf\u00e9", "cafe\u0301", "a"]) == r"'caf\xe9' and 'cafe\u0301'"
    many = [f"{i}{end}" for i in range(8) for end in ("", " ")]
    assert look_alikes_in_words(many).endswith("'4' and '4 ' (and 3 more)")
    assert look_alikes_in_words(["a", "b"]) == ""


def test_what_was_meant_names_strange_ones_alone():
    assert meant(["b ", "z"], {"a", "A", "b"}) == " (they differ only in blanks, case or form: 'b ' and 'b')"
    assert meant(["z"], {"a", "A"}) == ""


def test_numbers_written_in_several_ways_look_alike():
    assert look_alikes(["1", "1.0", "01", "+1", "2", "10"]) == [["1", "1.0", "01", "+1"]]
    assert look_alikes(["1e3", "1000", "a1", "a01"]) == []

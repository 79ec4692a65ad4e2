"""tests/README.md leads from each public name and option to its tests, and leaves none out."""

import tests_table


def test_every_public_name_and_option_has_a_test():
    assert not tests_table.uncovered(), (
        "no test covers these: mark one that really tests each of them, or write one, with "
        '@pytest.mark.covers("..."); then run `python tools/tests_table.py`'
    )


def test_no_marker_names_what_does_not_exist():
    assert not tests_table.unknown(), (
        "these names in pytest.mark.covers are no public names of opendelta, nor their members or "
        "options: correct them, or take them out"
    )


def test_the_table_is_what_the_markers_say():
    text = tests_table.PAGE.read_text(encoding="utf-8")
    message = "the markers of the tests changed: run `python tools/tests_table.py`"
    assert tests_table.page(text) == text, message

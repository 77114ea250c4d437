"""Tables for the terminal: where cells stand, and what stands around them."""

import pytest

from pipeline.reporting.text_table import TextTable


def test_numbers_are_aligned_to_the_right_between_the_heading_and_the_notes():
    table = TextTable("what it is", ["method", "PSNR dB"], [["input", "7.01"], ["the student", "123456.00"]], ["why"])
    assert str(table).splitlines() == [
        "what it is",
        "method         PSNR dB",
        "input             7.01",
        "the student  123456.00",
        "why",
    ]


def test_texts_are_aligned_to_the_left_and_lines_end_with_their_last_cell():
    rows = [["beta", "0.1 to 1", "0.6"], ["gamma", "", "12"], ["scale", "linear", ""]]
    assert str(TextTable("", ["", "range", "at"], rows, texts=2)).splitlines() == [
        "       range      at",
        "beta   0.1 to 1  0.6",
        "gamma             12",
        "scale  linear",
    ]
    assert str(TextTable("", ["one", "two"], [["a", "b"]], texts=2)) == "one  two\na    b"


def test_a_row_needs_a_cell_for_each_column():
    with pytest.raises(ValueError):
        str(TextTable("", ["one", "two"], [["a"]]))


def test_a_table_without_rows_shows_its_columns():
    assert str(TextTable("head", ["one", "two"], [])) == "head\none  two"

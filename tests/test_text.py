import pytest
import torch

from ghostify.text import format_count, format_shape, one_line, printable


def test_shapes_are_sizes_with_a_cross_between():
    assert format_shape(torch.zeros(3, 8, 8).shape) == "3x8x8"
    assert format_shape(("N", 3)) == "Nx3"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, ""),
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (1234, "1.23 k"),
        (2_500_000, "2.5 M"),
        (4_112_000_000, "4.11 G"),
    ],
)
def test_counts_have_three_digits_and_a_unit(count, text):
    assert format_count(count) == text


def test_control_characters_are_written_as_escapes():
    assert printable("a[/b] :cat: é\n") == "a[/b] :cat: é\n"
    assert printable("\x1b[31mred\x07\u202e\udcff") == "\\x1b[31mred\\x07\\u202e\\udcff"


def test_one_line_has_no_line_ends_and_no_colours():
    assert one_line(" a\n\n\x1b[1mb\x1b[0m\tc\x00 ") == "a b c\\x00"
    assert one_line("ab" * 1000, 100) == f"{'ab' * 25} ... {'ab' * 25}"

"""Tables of numbers: what is read of them as people write them, and what is refused by line and column."""

import numpy as np
import pytest

from d2v_scale.conversion.array_tables import TableReading, read_table

NAN = float("nan")


def columns_of(text: str | bytes, **reading: object) -> list[list[float]]:
    table = read_table(text if isinstance(text, bytes) else text.encode(), TableReading(**reading))  # type: ignore[arg-type]
    assert table.dtype == np.float32
    return table.tolist()


@pytest.mark.parametrize(
    ("text", "channels"),
    [
        ("1,2\n3,4\n5,6\n", [[1, 3, 5], [2, 4, 6]]),
        ("1;2\r\n3;4", [[1, 3], [2, 4]]),
        ("1\t-2e1\n\n3\t+4.5\n", [[1, 3], [-20, 4.5]]),
        ("1.5\n2.5\n", [[1.5, 2.5]]),
        (" 1.0e+00  2.0e+00\n 3.0e+00 4.0e+00\n", [[1, 3], [2, 4]]),
        ("a,b\n1,2\n", [[1], [2]]),
        ('"a","b, too"\n"1","2"\n', [[1], [2]]),
        ("\ufeffa,b\n1,2\n", [[1], [2]]),
        ("\ufeff1,2\n3,4\n", [[1, 3], [2, 4]]),
        (",x,y\n0,7,8\n1,9,10\n", [[7, 9], [8, 10]]),
        ('"","V1"\n"1",7\n"2",8\n', [[7, 8]]),
        (",0,1\n0,7,8\n1,9,10\n", [[7, 9], [8, 10]]),
        ("1,2,\n3,4,\n", [[1, 3], [2, 4], [NAN, NAN]]),
        ("1,\n,4\nNA,nan\nnull,5\n", [[1, NAN, NAN, NAN], [NAN, 4, NAN, 5]]),
    ],
)
def test_a_column_is_a_channel_whatever_wrote_the_table(text: str, channels: list[list[float]]) -> None:
    np.testing.assert_array_equal(columns_of(text), np.array(channels, dtype=np.float32))


def test_utf_16_of_a_spreadsheet_is_read() -> None:
    assert columns_of("a\tb\n1\t2\n".encode("utf-16")) == [[1], [2]]


@pytest.mark.parametrize(
    ("reading", "channels"),
    [
        ({"columns": ["c", "a"]}, [[3, 6], [1, 4]]),
        ({"columns": ["2"]}, [[2, 5]]),
        ({"columns": ["3", "1"], "header": True}, [[3, 6], [1, 4]]),
    ],
)
def test_columns_are_chosen_by_name_or_number(reading: dict, channels: list[list[float]]) -> None:
    assert columns_of("a,b,c\n1,2,3\n4,5,6\n", **reading) == channels


def test_columns_beside_those_that_are_chosen_may_hold_words() -> None:
    assert columns_of("2020-01-01,1,2\n2020-01-02,3,4\n", columns=["2", "3"]) == [[1, 3], [2, 4]]
    assert columns_of("day,a,b\n2020-01-01,1,2\n", columns=["3"]) == [[2]]
    assert columns_of("day,a,b\n2020-01-01,1,2\n", columns=["a"]) == [[1]]


def test_what_the_first_line_is_can_be_said() -> None:
    assert columns_of("0,1,2\n3,4,5\n", header=False) == [[0, 3], [1, 4], [2, 5]]
    assert columns_of("0,1,2\n3,4,5\n", header=True) == [[3], [4], [5]]
    assert columns_of("1,2\n3,4\n", delimiter=",", header=True, columns=["2"]) == [[4]]


@pytest.mark.parametrize(
    ("text", "reading", "said"),
    [
        ("", {}, "is empty"),
        (" \n\n", {}, "is empty"),
        ("a,b\n", {}, "holds no rows"),
        ("1,2\n3,x\n", {}, "holds 'x' in line 2, column 2, which is no number"),
        ("1;2\n1,5;2\n", {}, "holds '1,5' in line 2, column 1"),
        ("1,1_000\n", {"header": False}, "holds '1_000' in line 1, column 2"),
        ("1,2\n3\n", {}, "has 1 columns in line 2, not 2"),
        ("1,2\n3,4,5\n", {}, "has 3 columns in line 2, not 2"),
        ("time,1,2\n1,2,3\n", {}, "words and numbers in its first line.*--header"),
        ("0,1,2\n5,6,7\n", {}, "first line of 0, 1, 2.*--header"),
        ("a,b\n1,2\n", {"columns": ["c"]}, "has no column 'c': it has a, b"),
        ("a,a\n1,2\n", {"columns": ["a"]}, "has several columns 'a'"),
        ("a,b\n1,2\n", {"columns": ["a"], "header": False}, "has no column 'a': it has no names"),
        ("1,2\n", {"columns": ["3"]}, "has 2 columns, and no column 3"),
        (b"\xff,2\n1,2\n", {}, "is no text"),
        (b"a,b\n1,\xe9\n", {}, "is no text"),
        ('1,"2\n3,4\n', {}, "is no table"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused_in_words(text: str | bytes, reading: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        columns_of(text, **reading)

import random

import numpy as np
import pytest

from jmm_fast.data import text_rows
from jmm_fast.data.text_rows import parse_rows, parse_rows_python
from jmm_fast.errors import UserError

BOTH = pytest.mark.parametrize("parse", [parse_rows, parse_rows_python])


@BOTH
@pytest.mark.parametrize(
    "text",
    [
        b"1 -2.5 3e2\n.5 5. +0\n",
        b"1,-2.5,3e2\r\n.5,5.,+0",
        b"  1\t-2.5  3E+2 \n\t.5   5. 0.0000000000000000000 \n\n \r\n\n",
        b"1 , -2.5,\t3000e-1,\n.5 5.,0\n",
        b"1 -2.50000000000000000000001 300\r\n0.5 5 -0",
    ],
)
def test_reads_what_people_write(parse, text):
    rows = parse(text, 3)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.array([[1, -2.5, 300], [0.5, 5, 0]], np.float32))


@BOTH
def test_text_without_rows(parse):
    for text in (b"", b"\n", b" \r\n\t\n"):
        assert parse(text, 4).shape == (0, 4)


@BOTH
def test_rounds_to_double_first_as_numpy_does(parse):
    # Half way between two floats and a hair more: straight to float it would go up.
    texts = ["1.00000017881393432617187500001", "16777217", "0.1", "123456.789012345678", "-1.17549435e-38", "9.9e-46"]
    expected = np.array([float(text) for text in texts]).astype(np.float32)
    np.testing.assert_array_equal(parse(" ".join(texts).encode(), len(texts))[0], expected)


@BOTH
def test_nan_and_infinity_are_numbers(parse):
    row = parse(b"nan -inf Infinity 1e39 -nan", 5)[0]
    assert np.isnan(row[[0, 4]]).all() and (row[1:4] == [-np.inf, np.inf, np.inf]).all()


@BOTH
@pytest.mark.parametrize(
    "text, message",
    [
        (b"1 2 3\n4 5\n", "line 2: expected 3 numbers, got 2"),
        (b"1 2 3\n4 5 6 7 8\n", "line 2: expected 3 numbers, got 5"),
        (b"1 2 3\n\n4 5 6\n", "line 2: expected 3 numbers, got 0"),
        (b"1 2 3\r4 5 6\r", "line 1: expected 3 numbers, got 6"),
        (b"1 2 3\n4 5 6\n7 8", "line 3: expected 3 numbers, got 2"),
        (b"1,2,3\n4,,6\n", "line 2: value 2 is empty"),
        (b",1,2,3", "line 1: value 1 is empty"),
        (b"1,2,3,,", "line 1: value 4 is empty"),
        (b"1 2 three", "line 1: value 3 is not a number: three"),
        (b"1 2 -", "line 1: value 3 is not a number: -"),
        (b"1 2 .", "line 1: value 3 is not a number: ."),
        (b"1 2 1e", "line 1: value 3 is not a number: 1e"),
        (b"1 2 +-1", "line 1: value 3 is not a number: +-1"),
        (b"1 2 1_0", "line 1: value 3 is not a number: 1_0"),
        (b"1 2 0x10", "line 1: value 3 is not a number: 0x10"),
        (b"1 2 nan(3)", "line 1: value 3 is not a number: nan(3)"),
        (b"1 2 1.2.3", "line 1: value 3 is not a number: 1.2.3"),
        (b"1 2 1;2", "line 1: value 3 is not a number: 1;2"),
        (b"\xef\xbb\xbf1 2 3", "line 1: value 1 is not a number: ???1"),
        (b"1 \x00 3", "line 1: value 2 is not a number: ?"),
        (b"1 2 " + b"9" * 50 + b"x", "line 1: value 3 is not a number: 999999999999999999999999"),
        (b"1e400 2 3", "line 1: value 1 is out of range: 1e400"),
        (b"1 2 -0.1e-999", "line 1: value 3 is out of range: -0.1e-999"),
    ],
)
def test_says_which_line_and_why(parse, text, message):
    with pytest.raises(UserError) as error:
        parse(text, 3)
    assert str(error.value) == message


def test_both_agree_on_damaged_text():
    rng = random.Random(0)
    parts = [
        b"0.123456",
        b"-1.5",
        b"7",
        b" ",
        b" ",
        b" ",
        b",",
        b"\n",
        b"\r\n",
        b"\t",
        b".",
        b"e5",
        b"nan",
        b"12345678",
    ]
    parts += [b"-", b"+", b"\x0b", b"\x00", b"inf", b"00000000000000000001", b"e-400", b"1e22"]
    refused = 0
    for _ in range(4000):
        columns = rng.randint(1, 3)
        if rng.random() < 0.5:
            text = b"".join(rng.choices(parts, k=rng.randint(0, 12)))
        else:
            lines = [b" ".join(rng.choices(parts[:3] + parts[-1:], k=columns)) for _ in range(rng.randint(1, 4))]
            text = bytearray(b"\n".join(lines))
            text[rng.randrange(len(text))] = rng.choice(b"0.-, \n\r9x")
            text = bytes(text)
        results = []
        for parse in (parse_rows, parse_rows_python):
            try:
                results.append(parse(text, columns).tolist())
            except UserError as error:
                results.append(str(error))
        refused += isinstance(results[0], str)
        assert repr(results[0]).replace("-nan", "nan") == repr(results[1]).replace("-nan", "nan"), text
    assert 500 < refused < 3500


def test_both_agree_on_every_kind_of_number():
    rng = np.random.default_rng(0)
    values = rng.normal(size=3000) * 10.0 ** rng.integers(-12, 12, 3000)
    formats = ["%.6f", "%.7f", "%.9g", "%.17g", "%.3e", "%.0f", "%.25f", "%r"]
    text = "\n".join(" ".join(form % float(value) for form in formats) for value in values).encode()
    ours = parse_rows(text, len(formats))
    np.testing.assert_array_equal(ours, parse_rows_python(text, len(formats)))
    expected = [[float(form % float(value)) for form in formats] for value in values]
    np.testing.assert_array_equal(ours, np.array(expected).astype(np.float32))


def test_huge_counts_cost_no_memory():
    text = b"1\n" * 100_000
    with pytest.raises(UserError, match="line 1: expected 1000000 numbers, got 1"):
        parse_rows(text, 1_000_000)


def test_goes_without_the_extension(monkeypatch):
    monkeypatch.setattr(text_rows, "_host", None)
    assert parse_rows(b"1 2\n3 4", 2).tolist() == [[1, 2], [3, 4]]


def test_the_extension_refuses_other_arguments():
    host = pytest.importorskip("jmm_fast._host", reason="the C++ reader extension is not built", exc_type=ImportError)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        host.parse_rows(b"1", 0)
    with pytest.raises(TypeError):
        host.parse_rows("1", 1)

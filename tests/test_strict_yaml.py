"""Numbers and words as YAML 1.2 has them, nothing twice, and files that any reader of YAML reads alike."""

import math

import pytest
import yaml

from qies.strict_yaml import dumps, loads


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("+5", 5), ("-3", -3), ("1e-5", 1e-5), ("1e3", 1e3), ("1E+9", 1e9),
        (".5", 0.5), ("1.", 1.0), ("-.inf", -math.inf), ("1e400", math.inf),
        ("21:20", "21:20"), ("1_000", "1_000"), ("2001-01-01", "2001-01-01"), ("no", "no"), ("on", "on"), ("<<", "<<"),
        ("0b11", "0b11"), ("50k", "50k"), ("'010'", "010"), ("1e", "1e"),
        ("", None), ("~", None), ("null", None), ("true", True), ("FALSE", False),
        ("{a.b: 1, c: [x, 2e-3]}", {"a.b": 1, "c": ["x", 2e-3]}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
    ],
)  # fmt: skip
def test_values(text, value):
    read = loads(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' in line 3 is a repeat"),
        ("a: {b: 1, b: 1}", "the key 'b' in line 1 is a repeat"),
        ("1: 2", "the key 1 in line 1 is not text"),
        ("a: &x {b: *x}", "recursive"),
        ("[&x [*x]]", "recursive"),
        ("!!python/object/apply:os.getcwd []", "constructor"),
        ("!!timestamp 2001-01-01", "constructor"),
        ("!!bool maybe", "'maybe' is not true or false"),
        ("!!int x", "invalid literal"),
        ("9" * 5000, "digits"),
        ("[" * 3000, "recursion"),
        ("a: 1\n---\nb: 2", "single document"),
        ("\x00", "unacceptable character"),
    ],
)
def test_what_is_refused_in_one_line(text, words):
    with pytest.raises(ValueError, match=words) as e:
        loads(text)
    assert "\n" not in str(e.value)


def test_what_is_written_reads_alike_in_both_versions_of_yaml():
    words = [
        "1e5",
        "010",
        "21:20",
        "no",
        "0o17",
        "0x1f",
        "1_000",
        "~",
        "",
        "2001-01-01",
        "1.0",
        "=",
        "<<",
        "null",
        "50k",
    ]
    values = {"v": [*words, "a: b", "\u00fc", 1e-5, 1e16, 1e-300, 10, -3, True, None, 1.5, 1e22, {"train.lr": 2e-3}]}
    assert loads(dumps(values)) == yaml.safe_load(dumps(values)) == values

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import UserError
from tessera.plain_yaml import MAX_YAML_BYTES, dump_yaml, parse_yaml, read_yaml, write_yaml

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
plain = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


@given(st.dictionaries(st.text(), plain))
def test_what_is_written_is_read_back(mapping):
    assert parse_yaml(dump_yaml(mapping)) == mapping


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e3", 5e3),
        (".5", 0.5),
        ("20_000", 20000),
        ("-3", -3),
        ("0012", "0012"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("no", "no"),
        ("True", True),
        ("~", None),
        ("[1, a, null]", [1, "a", None]),
        ("'1'", "1"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    result = parse_yaml(text)
    assert result == value
    assert type(result) is type(value)


def test_nan_and_infinity_survive():
    result = parse_yaml(dump_yaml({"a": math.nan, "b": -math.inf}))
    assert math.isnan(result["a"]) and result["b"] == -math.inf


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['echo hacked']",
        "!!python/name:os.system",
        "!!timestamp 2026-01-01",
        "!!binary aGk=",
        "!custom {a: 1}",
        "a: &x [1]\nb: *x",
        "a: 1\na: 2",
        "? [1, 2]\n: 3",
        "a: [",
        "a: 1\n---\nb: 2",
        "\x00",
        "[" * 5000,
        "9" * 5000,
    ],
)
def test_what_is_not_plain_is_refused(text):
    with pytest.raises(UserError, match="not plain YAML"):
        parse_yaml(text)


def test_the_line_of_a_mistake_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1\nb: 2\nb: 3\n")
    with pytest.raises(UserError, match=r"a\.yaml: line 3: .*'b' is given twice"):
        read_yaml(tmp_path / "a.yaml")


def test_a_file_is_a_mapping(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing but a comment\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"list\.yaml: expected `key: value` lines, got a list"):
        read_yaml(tmp_path / "list.yaml")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: no such file"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8 text \(byte 9\)"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(UserError, match=r"huge\.yaml: larger than 8 MiB"):
        read_yaml(tmp_path / "huge.yaml")


def test_short_lists_take_one_line_and_order_is_kept(tmp_path):
    write_yaml(tmp_path / "a.yaml", {"z": (1, 2), "a": {"b": [[1], [2]]}})
    assert (tmp_path / "a.yaml").read_text() == "z: [1, 2]\na:\n  b:\n  - [1]\n  - [2]\n"

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tessera.data.candidates import Candidate, Reject
from tessera.data.captions import NOT_UTF_8, NOTE_LATIN_1
from tessera.data.layouts.metadata import NO_IMAGE_FOR_ROW, read_metadata

OUTSIDE = "points outside the folder"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def read(path: Path, notes: Counter[str] | None = None) -> list[Candidate | Reject]:
    return list(read_metadata(path.parent.resolve(), path.name, Counter() if notes is None else notes))


def captions(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(item.location.file, item.captions) for item in read(path) if isinstance(item, Candidate)]


def reasons(path: Path) -> dict[str, str]:
    return dict(item for item in read(path) if isinstance(item, Reject))


def test_json_lines_give_captions(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "first", "extra": 1},
        {"file_name": "sub/b.png", "caption": ["one", "two", 3]},
        {"file_name": "c.png", "prompt": ""},
        {"file_name": "./sub/../a.png", "TEXT": "second"},
        {"file_name": "d.png", "text": None, "caption": "the next column"},
        {"file_name": "d.png"},
    ]
    touch(tmp_path, "a.png", "sub/b.png", "c.png", "d.png")
    path = tmp_path / "metadata.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert captions(path) == [
        ("a.png", ("first",)),
        ("sub/b.png", ("one", "two")),
        ("c.png", ("",)),
        ("a.png", ("second",)),
        ("d.png", ("the next column",)),
        ("d.png", ()),
    ]
    assert reasons(path) == {}


@pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.csv", ";"), ("x.csv", "\t")])
def test_separated_values_give_captions(tmp_path: Path, name: str, delimiter: str) -> None:
    lines = [
        ["File_Name", "width", "Prompt"],
        ["a.png", "8", '"a star, ""red""; on\nwhite"'],
        ["b.png", "8", '"[""one"", ""two""]"'],
        ["c.png", "8", "[bracketed"],
    ]
    touch(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / name).write_bytes("\r\n".join(map(delimiter.join, lines)).encode())
    assert captions(tmp_path / name) == [
        ("a.png", ('a star, "red"; on white',)),
        ("b.png", ("one", "two")),
        ("c.png", ("[bracketed",)),
    ]


def test_a_table_of_tabs_may_have_commas_in_its_header(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "x.tsv").write_text("file_name\ttext\twidth, height, depth\na.png\thello, you\t1, 2, 3\n")
    assert captions(tmp_path / "x.tsv") == [("a.png", ("hello, you",))]


def test_a_quote_in_a_table_of_tabs_swallows_no_rows(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png", "d.png")
    lines = ['a.png\t"Wide" angle', 'b.png\t"never closed', 'c.png\t"a ""red"" star"', 'd.png\t"']
    (tmp_path / "x.TSV").write_text("\n".join(['file_name\t"text"', *lines]))
    assert captions(tmp_path / "x.TSV") == [
        ("a.png", ('"Wide" angle',)),
        ("b.png", ('"never closed',)),
        ("c.png", ('a "red" star',)),
        ("d.png", ('"',)),
    ]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t")])
def test_an_empty_cell_says_nothing(tmp_path: Path, suffix: str, delimiter: str) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    rows = [("file_name", "image", "text", "caption"), ("a.png", "", "", "a cat"), ("", "b.png", "b", ""), ("c.png",)]
    (tmp_path / f"x{suffix}").write_text("\n".join(map(delimiter.join, rows)))
    assert captions(tmp_path / f"x{suffix}") == [("a.png", ("a cat",)), ("b.png", ("b",)), ("c.png", ())]


@pytest.mark.parametrize(
    ("suffix", "delimiter", "hint"),
    [
        (".csv", ",", "quote captions that hold commas"),
        (".csv", ";", "quote captions that hold semicolons"),
        (".tsv", "\t", "captions must not hold tabs"),
    ],
)
def test_a_row_of_too_many_fields_is_refused_and_not_cut(
    tmp_path: Path, suffix: str, delimiter: str, hint: str
) -> None:
    touch(tmp_path, "a.png", "b.png")
    rows = [("file_name", "text"), ("a.png", "red", " green"), ("b.png", "blue", "", "")]
    path = tmp_path / f"x{suffix}"
    path.write_text("\n".join(map(delimiter.join, rows)))
    assert captions(path) == [("b.png", ("blue",))]
    assert reasons(path) == {f"{path.name}:2": f"metadata row with more fields than the header: {hint}"}


def test_a_parquet_caption_that_is_not_utf_8_costs_its_row_alone(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.png"]
    touch(tmp_path, *names)
    texts = pyarrow.array([b"a cat", b"caf\xe9", b"a dog"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"file_name": names, "text": texts}), tmp_path / "metadata.parquet")
    assert captions(tmp_path / "metadata.parquet") == [("a.png", ("a cat",)), ("c.png", ("a dog",))]
    assert reasons(tmp_path / "metadata.parquet") == {"metadata.parquet row 1": NOT_UTF_8}


def test_parquet_tables_give_captions(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    names = ["a.png", "b.png", "gone.png", "c.png", None]
    texts = [["one", "two"], ["three"], ["four"], None, ["five"]]
    parquet.write_table(
        pyarrow.table({"file_name": names, "TEXT": texts, "clip": [0.5] * 5}), tmp_path / "metadata.parquet"
    )
    path = tmp_path / "metadata.parquet"
    assert captions(path) == [("a.png", ("one", "two")), ("b.png", ("three",)), ("c.png", ())]
    assert reasons(path) == {
        "metadata.parquet row 2": NO_IMAGE_FOR_ROW,
        "metadata.parquet row 4": "metadata row without file_name",
    }


def test_a_damaged_parquet_table_is_one_reject(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 nothing of use PAR1")
    (reject,) = read(tmp_path / "metadata.parquet")
    assert isinstance(reject, Reject) and reject.reason.startswith("damaged: ")
    assert len(reject.reason) <= 120 and "\n" not in reject.reason


def test_guessed_columns_are_noted_once_a_table(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "x.csv").write_text("Image,Prompt\na.png,one\nb.png,two\n")
    notes: Counter[str] = Counter()
    for _ in range(2):
        read(tmp_path / "x.csv", notes)
    assert notes == {
        "column 'Image' of a metadata file taken as 'file_name'": 2,
        "column 'Prompt' of a metadata file taken as 'text'": 2,
    }
    (tmp_path / "x.csv").write_text("file_name,text\na.png,one\n")
    notes.clear()
    read(tmp_path / "x.csv", notes)
    assert not notes, "the standard names are no guess"


def write_table(path: Path, rows: list[dict[str, str | None]]) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = [rows[0].keys(), *([value or "" for value in row.values()] for row in rows)]
        path.write_text("\n".join(map(",".join, lines)))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_only_column_that_ends_like_a_file_name_names_the_image(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "a.png", "b.png")
    path = tmp_path / f"x{suffix}"
    write_table(path, [{"Image_File_Name": f"{name}.png", "text": name} for name in "ab"])
    assert captions(path) == [("a.png", ("a",)), ("b.png", ("b",))]
    notes: Counter[str] = Counter()
    read(path, notes)
    assert notes == {"column 'Image_File_Name' of a metadata file taken as 'file_name'": 1}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_of_several_such_columns_none_is_guessed(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "a.png", "m.png")
    path = tmp_path / f"x{suffix}"
    row: dict[str, str | None] = {"image_file_name": "a.png", "mask_file_name": "m.png", "text": "a cat"}
    write_table(path, [row, {**row, "image_file_name": None}])
    (reason,) = {item.reason if isinstance(item, Reject) else "kept" for item in read(path)}
    assert reason == (
        "metadata row without file_name but with 'image_file_name' and 'mask_file_name', "
        "rename the one to read to file_name"
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["file_name", "image"])
def test_known_columns_go_before_those_that_end_like_them(tmp_path: Path, suffix: str, column: str) -> None:
    touch(tmp_path, "a.png", "m.png")
    path = tmp_path / f"x{suffix}"
    masked: dict[str, str | None] = {"mask_file_name": "m.png", "text": "a cat", column: "a.png"}
    write_table(path, [masked, {**masked, column: None}])
    assert captions(path) == [("a.png", ("a cat",))], "a mask is no picture of what the caption says"
    assert list(reasons(path).values()) == ["metadata row without file_name"]


def test_rows_of_ever_other_columns_are_counted_as_one_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({f"{n}_file_name": "a", f"{n}b_file_name": "b"}) for n in range(50)))
    found = reasons(path)
    assert len(found) == 50 and len(set(found.values())) == 1


def test_rows_that_name_no_image_are_rejected_by_line(tmp_path: Path) -> None:
    lines = [
        "not json",
        "[1, 2]",
        '{"text": "who?"}',
        '{"file_name": 7, "text": "x"}',
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "nul\\u0000.png", "text": "x"}',
        '{"file_name": "half\\ud800.png", "text": "x"}',
        "[" * 100_000,
    ]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(lines))
    found = reasons(path)
    assert list(found) == [f"metadata.jsonl:{line}" for line in range(1, 9)]
    values = list(found.values())
    assert values[:5] == [
        "metadata row is not JSON",
        "metadata row is not an object",
        "metadata row without file_name",
        "metadata row without file_name",
        NO_IMAGE_FOR_ROW,
    ]
    assert values[7] == "metadata row is not JSON"


def test_a_damaged_csv_row_does_not_hide_the_next_ones(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    path = tmp_path / "metadata.csv"
    path.write_text(f"file_name,text\nb.png,{'x' * 200_000}\na.png,fine\n")
    assert captions(path) == [("a.png", ("fine",))]
    assert "not CSV" in reasons(path)["metadata.csv:2"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_old_encodings_are_understood(tmp_path: Path, encoding: str, suffix: str) -> None:
    touch(tmp_path, "a.png", "b.png")
    rows = [("a.png", "café"), ("b.png", "thé")]
    if suffix == ".csv":
        lines = ["file_name,text", *map(",".join, rows)]
    else:
        lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in rows]
    path = tmp_path / f"x{suffix}"
    path.write_bytes("\r\n".join(lines).encode(encoding))
    notes: Counter[str] = Counter()
    found = [item.captions for item in read(path, notes) if isinstance(item, Candidate)]
    assert found == [("café",), ("thé",)]
    assert notes == ({NOTE_LATIN_1: 1} if encoding == "latin-1" else {})


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".tsv", ".parquet"])
def test_an_empty_or_missing_table_is_no_accident(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    assert reasons(path)[path.name].startswith("cannot be read")
    path.touch()
    assert len(read(path)) == (1 if suffix == ".parquet" else 0)
    path.unlink()
    path.mkdir()
    assert reasons(path) == {path.name: "not a regular file"}


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "{absolute}", "link.png", "linked/secret.png"])
def test_rows_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "data"
    touch(tmp_path, "data/a.png", "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "linked").symlink_to(tmp_path)
    name = name.format(absolute=tmp_path / "secret.png")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    assert read(root / "metadata.jsonl") == [Reject("metadata.jsonl:1", OUTSIDE)]

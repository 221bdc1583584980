import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 images with captions and one without."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(13):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02}.png")
        if number < 12:
            (root / f"{number:02}.txt").write_text(f"picture {number}")
    return root


def test_an_ingest_says_what_it_found_and_where(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingest", str(folder), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seen 13 = kept 12 + rejected 1 + duplicate 0; rejected: 1 no caption"
    assert lines[1] == "7.7% of what was seen cannot be used"
    assert lines[2] == f"what was refused, and why: {tmp_path / 'out' / 'rejects.jsonl'}"
    assert lines[3].startswith(f"manifest: {tmp_path / 'out' / 'manifest.jsonl'} (")
    assert (tmp_path / "out" / "manifest.jsonl").exists() and (tmp_path / "out" / "rejects.jsonl").exists()


def test_few_refusals_raise_no_alarm(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "12.txt").write_text("no longer silent")
    assert main(["ingest", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["seen", "manifest:"]


def test_an_ingest_can_be_read_by_programs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", str(folder), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["manifest"] == str(tmp_path / "out" / "manifest.jsonl")
    assert (found["seen"], found["kept"], found["rejected"], found["duplicate"]) == (13, 12, 1, 0)
    assert found["reasons"] == {"no caption": 1} and found["train"] + found["validation"] == 12


@pytest.mark.parametrize(
    "given", [["{out}"], ["{out}/manifest.jsonl"], ["--out", "{out}"], ["{photos}", "--out", "{out}"]]
)
def test_a_check_finds_every_image_whose_bytes_differ(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    out = tmp_path / "out"
    main(["ingest", str(folder), "--out", str(out)])
    capsys.readouterr()
    arguments = ["ingest", *(word.format(out=out, photos=folder) for word in given), "--check"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "compared 12 = unchanged 12 + changed 0 + missing 0\n"
    content = bytearray((folder / "03.png").read_bytes())
    content[-20] ^= 1
    (folder / "03.png").write_bytes(content)
    (folder / "07.png").unlink()
    assert main(arguments) == 2
    assert capsys.readouterr().out.splitlines() == [
        "03.png: changed",
        "07.png: missing: cannot be read: No such file or directory",
        "compared 12 = unchanged 10 + changed 1 + missing 1",
    ]
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"images": 12, "changed": ["03.png"], "missing": ["07.png"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected PATH and --out DIR"),
        (["photos"], "expected PATH and --out DIR"),
        (["--check"], "--check needs a manifest, or the folder that holds it"),
        (["{tmp}/photos", "--check"], "manifest.jsonl does not exist: make it with `tessera ingest PATH --out DIR`"),
        (
            ["{tmp}/manifest.jsonl", "--out", "{tmp}/out"],
            "manifest.jsonl is a manifest already: train on it, or verify",
        ),
        (["{tmp}/manifest.jsonl"], "manifest.jsonl is a manifest already: train on it, or verify it with --check"),
        (["{tmp}/photos", "--out", "{tmp}/file"], "file cannot be made a folder for the manifest: File exists"),
        (["{tmp}/photos", "--out", "{tmp}/file/out"], "out cannot be made a folder for the manifest: Not a directory"),
        (["{tmp}/gone", "--out", "{tmp}/out"], "gone does not exist: expected a folder of captioned images"),
    ],
)
def test_wrong_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "file").touch()
    (tmp_path / "manifest.jsonl").write_text('{"tessera_manifest": 2}\n')
    assert main(["ingest", *(word.format(tmp=tmp_path) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()

from pathlib import Path

import numpy as np
import pytest

from tessera.data.manifest_index import TRAIN, VALIDATION, Index, map_index, write_index


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_index_comes_back_as_it_was_written(tmp_path: Path, count: int) -> None:
    lines = tmp_path / "manifest.jsonl"
    lines.write_text("the lines")
    written = Index.of(
        range(0, 3 * count + 1, 3), np.linspace(0, 1, count), [VALIDATION, TRAIN, TRAIN, TRAIN, 1][:count]
    )
    write_index(written, lines, tmp_path)
    read = map_index(lines)
    assert read is not None
    for before, after in zip(written, read, strict=True):
        assert before.dtype == after.dtype and (before == after).all()
    assert not read.offsets.flags.writeable


def test_an_index_of_other_lines_is_none(tmp_path: Path) -> None:
    lines = tmp_path / "manifest.jsonl"
    lines.write_text("the lines")
    assert map_index(lines) is None
    write_index(Index.of([0, 9], [0.5], [TRAIN]), lines, tmp_path)
    assert map_index(lines) is not None
    index = tmp_path / "manifest.index"
    whole = index.read_bytes()
    for damage in (b"", whole[:20], whole[:-1], whole + b"x", b"another " + whole[8:]):
        index.write_bytes(damage)
        assert map_index(lines) is None
    index.write_bytes(whole)
    lines.write_text("more lines")
    assert map_index(lines) is None

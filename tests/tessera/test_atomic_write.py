import os
import stat

import pytest

from tessera.atomic_write import atomic_write


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    with atomic_write(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"new")
        assert not (tmp_path / "a.bin").exists()
        assert temporary.parent == tmp_path  # renames are atomic within one file system only
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half of the n")
        raise RuntimeError
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    with atomic_write(tmp_path / "a.bin") as temporary:
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as writers with private files do
    (tmp_path / "ordinary").touch()
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)

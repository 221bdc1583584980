from pathlib import Path

import pytest

from tessera.data.candidates import Location
from tessera.data.images import ImageError
from tessera.data.reading import OUTSIDE, read_bytes, resolve_inside


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not even an image")
    assert read_bytes(tmp_path.resolve(), Location("a.png")) == b"not even an image"
    with pytest.raises(ImageError, match="cannot be read"):
        read_bytes(tmp_path.resolve(), Location("b.png"))


@pytest.mark.parametrize("place", [{}, {"offset": 0, "size": 4}, {"row": 0}])
def test_nothing_outside_of_the_root_is_read(tmp_path: Path, place: dict[str, int]) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret")
    for file in ("../secret", "link", str(tmp_path / "secret")):
        with pytest.raises(ImageError, match=OUTSIDE):
            read_bytes((tmp_path / "root").resolve(), Location(file, **place))  # type: ignore[arg-type]


def test_resolving_refuses_what_lies_outside(tmp_path: Path) -> None:
    assert resolve_inside(tmp_path.resolve(), "a/b.png") == tmp_path.resolve() / "a" / "b.png"
    for source in ("../x", "/etc/hostname", "a/../../x"):
        with pytest.raises(ImageError, match=OUTSIDE):
            resolve_inside(tmp_path.resolve(), source)


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    root = (tmp_path / "root").resolve()
    root.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    (root / "out").symlink_to(tmp_path / "secret")
    for file in ("a/../out", "a", "a/x"):
        with pytest.raises(ImageError):
            read_bytes(root, Location(file))

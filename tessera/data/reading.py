"""The bytes of one image, wherever they lie: a file, a place in an archive, a row of a table; always below the root."""

import os
from pathlib import Path

from tessera.data.candidates import Location
from tessera.data.images import ImageError, read_file

HUB_PREFIX = "hf:"
OUTSIDE = "points outside the folder"


def read_bytes(root: Path, location: Location) -> bytes:
    """Reads one image file as it was stored; nothing is decoded.

    Args:
        root: the manifest's root, a resolved folder.
        location: where the bytes lie below it.

    Raises:
        ImageError: they cannot be read, or lie outside of the root.
    """
    # The readers of layouts are imported here because they import `resolve_inside`.
    if location.file.startswith(HUB_PREFIX):
        from tessera.data.layouts.hugging_face import read_image as read_row

        return read_row(location.file.removeprefix(HUB_PREFIX), location.row or 0)
    path = resolve_inside(root, location.file)
    if location.offset is not None:
        from tessera.data.layouts.tar import read_member

        return read_member(path, location.offset, location.size or 0)
    if location.row is None:
        return read_file(path)
    if path.is_dir():
        from tessera.data.layouts.hugging_face import read_image as read_row

        return read_row(str(path), location.row)
    from tessera.data.layouts.parquet import read_image

    return read_image(path, location.row)


def resolve_inside(root: Path, source: str) -> Path:
    """The file that a relative name means, links followed.

    Args:
        root: a resolved folder.
        source: name relative to it, with forward slashes.

    Raises:
        ImageError: it lies outside of the folder.
    """
    try:
        # Without "..": behind links that lead in a circle it would be left as it is, and lead outside.
        target = os.path.realpath(os.path.normpath(os.path.join(root, source)))
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        raise ImageError(f"cannot be read: {error}") from error
    found = Path(target)
    if not found.is_relative_to(root):
        raise ImageError(OUTSIDE)
    return found

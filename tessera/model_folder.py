"""The model folder that people share: safetensors and plain YAML, checked by hash, with nothing in it that can run.

    my-model/  tessera.yaml  tokenizer.model  README.md  dvae/  prior/  scorer/  (each: config.yaml, model.safetensors)

`tessera.yaml` lists the format version, each file's size and sha256, and what each part was trained with (`requires`).
A part's sha256 is that of the lines `config.yaml <sha256>` and `model.safetensors <sha256>`. File names are fixed: no
path is ever read from a file.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import tessera
from tessera.atomic_write import atomic_write
from tessera.config import to_plain
from tessera.errors import UserError
from tessera.plain_yaml import dump_yaml, read_yaml, write_yaml

FORMAT_VERSION = 3
PART_NAMES = ("dvae", "prior", "scorer")
INDEX_FILE = "tessera.yaml"
TOKENIZER_FILE = "tokenizer.model"
CARD_FILE = "README.md"
PART_FILES = ("config.yaml", "model.safetensors")

_TRAINED_BY = {"dvae": "train-dvae", "prior": "train-prior", "scorer": "train-scorer"}
_TRUNCATED_HASH = 12  # characters of a sha256 that users see


def write_tokenizer(folder: str | os.PathLike[str], proto: bytes) -> str:
    """Writes the text tokenizer.

    Args:
        folder: the model folder; made if absent.
        proto: a serialized sentencepiece model.

    Returns:
        Its sha256, as parts name it in `requires["tokenizer"]`.
    """
    folder, index = _prepare(folder)
    with atomic_write(folder / TOKENIZER_FILE) as temporary:
        temporary.write_bytes(proto)
    index["tokenizer"] = _fingerprint(folder / TOKENIZER_FILE)
    _write_index(folder, index)
    return index["tokenizer"]["sha256"]


def write_part(
    folder: str | os.PathLike[str],
    name: str,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    requires: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Writes or replaces one part; the index is written last.

    Args:
        folder: the model folder; made if absent.
        name: `dvae`, `prior` or `scorer`.
        config: the plain config that the part is built from (`tessera.config.to_plain`).
        tensors: its state dict; dtypes are kept, and every tensor is stored on its own even where two share memory.
        requires: sha256 of what it was trained with, by name: `dvae`, `tokenizer`. Checked when the folder is opened.
        metadata: plain values for people and model cards, e.g. measured figures.

    Returns:
        The part's sha256.
    """
    _check_name(name)
    folder, index = _prepare(folder)
    (folder / name).mkdir(exist_ok=True)
    for stale in (folder / name).glob(".*.tmp"):  # of a writer that was killed
        stale.unlink(missing_ok=True)
    config_path, tensors_path = (folder / name / file for file in PART_FILES)
    # Both are complete on the disk before the first one appears under its name.
    with atomic_write(tensors_path) as temporary_tensors, atomic_write(config_path) as temporary_config:
        safetensors.torch.save_file(_independent(tensors), temporary_tensors, metadata={"format": "pt"})
        temporary_config.write_text(dump_yaml(to_plain(config)), encoding="utf-8")
    files = {file: _fingerprint(folder / name / file) for file in PART_FILES}
    index["parts"][name] = {
        "sha256": _part_sha256(files),
        "requires": dict(requires or {}),
        "files": files,
        "metadata": to_plain(metadata or {}),
    }
    _write_index(folder, index)
    return index["parts"][name]["sha256"]


def write_card(folder: str | os.PathLike[str], markdown: str) -> None:
    """Writes the model card, `README.md`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / CARD_FILE) as temporary:
        temporary.write_text(markdown, encoding="utf-8")


def write_sampling_defaults(folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Writes the sampling settings that `generate` uses when the user gives none."""
    folder, index = _prepare(folder)
    index["sampling"] = to_plain(settings)
    _write_index(folder, index)


class ModelFolder:
    """A model folder that was checked when it was opened; read from it by part name.

    Attributes:
        path: the folder.
        parts: the names of the parts that were checked and can be read.
        sha256: of the tokenizer and the parts together; the first 12 characters are what users see.
    """

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        """For `ModelFolder.open`, which checks what this takes for granted."""
        self.path = path
        self.parts: tuple[str, ...] = tuple(name for name in PART_NAMES if name in index["parts"])
        self._index = index
        self.sha256: str = hashlib.sha256(
            "".join(
                [f"tokenizer {self._index['tokenizer']['sha256']}\n" if "tokenizer" in index else ""]
                + [f"{name} {index['parts'][name]['sha256']}\n" for name in self.parts]
            ).encode()
        ).hexdigest()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, parts: Collection[str] | None = None) -> "ModelFolder":
        """Opens a folder and checks the format version, every file's hash, and that the parts belong together.

        Args:
            path: the folder.
            parts: check and read only these, e.g. `["dvae"]` while the rest is still being trained; None is all.

        Raises:
            UserError: naming the part or file that is missing, damaged, or does not belong.
        """
        path = Path(path)
        index = _read_index(path)
        for name in parts or ():
            _check_name(name)
            if name not in index["parts"]:
                raise UserError(_no_part(path, name, index["parts"]))
        all_parts = index["parts"]
        if parts is not None:
            index = {**index, "parts": {name: part for name, part in index["parts"].items() if name in parts}}
        if "tokenizer" in index:
            _check_file(path, TOKENIZER_FILE, index["tokenizer"])
        for name, part in index["parts"].items():
            for file in PART_FILES:
                _check_file(path, f"{name}/{file}", part["files"][file])
            if part["sha256"] != _part_sha256(part["files"]):
                raise UserError(f"{path / INDEX_FILE} is damaged: sha256 of {name} is not that of its files")
        _check_requirements(path, index, all_parts)
        return cls(path, index)

    def has(self, name: str) -> bool:
        """Whether the part can be read."""
        _check_name(name)
        return name in self.parts

    def config(self, name: str) -> dict[str, Any]:
        """The part's plain config; build the dataclass with `tessera.config.from_plain`."""
        self._part(name)
        return read_yaml(self.path / name / "config.yaml")

    def tensors(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The part's state dict on a device, in the dtypes in which it was written."""
        self._part(name)
        file = self.path / name / "model.safetensors"
        try:
            return safetensors.torch.load_file(file, device=str(device))
        except safetensors.SafetensorError as error:
            raise UserError(f"{file}: not a safetensors file ({error})") from error

    def metadata(self, name: str) -> dict[str, Any]:
        """What was noted about the part when it was written."""
        return dict(self._part(name)["metadata"])

    def requires(self, name: str) -> dict[str, str]:
        """The sha256 of what the part was trained with, by name."""
        return dict(self._part(name)["requires"])

    def part_sha256(self, name: str) -> str:
        """The part's sha256."""
        return self._part(name)["sha256"]

    def tokenizer_proto(self) -> bytes:
        """The serialized sentencepiece model.

        Raises:
            UserError: if the folder has no text tokenizer.
        """
        self._tokenizer()
        return (self.path / TOKENIZER_FILE).read_bytes()

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a text tokenizer; one with a dVAE alone has none."""
        return "tokenizer" in self._index

    @property
    def tokenizer_sha256(self) -> str:
        """The text tokenizer's sha256."""
        return self._tokenizer()["sha256"]

    def sampling_defaults(self) -> dict[str, Any]:
        """The sampling settings that were tuned for this model; empty if none were."""
        return dict(self._index["sampling"])

    def _part(self, name: str) -> dict[str, Any]:
        _check_name(name)
        if name not in self.parts:
            raise UserError(_no_part(self.path, name, self.parts))
        return self._index["parts"][name]

    def _tokenizer(self) -> dict[str, Any]:
        if "tokenizer" not in self._index:
            raise UserError(f"{self.path} has no text tokenizer ({TOKENIZER_FILE})")
        return self._index["tokenizer"]


def short_sha256(sha256: str) -> str:
    """The form of a hash that users see."""
    return sha256[:_TRUNCATED_HASH]


def _prepare(folder: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, a model folder cannot be written there")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX_FILE).exists():
        return folder, _read_index(folder)
    return folder, {"parts": {}, "sampling": {}}


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    ordered = {
        "format_version": FORMAT_VERSION,
        "written_by": f"tessera {tessera.__version__}",
        **({"tokenizer": index["tokenizer"]} if "tokenizer" in index else {}),
        "parts": {name: index["parts"][name] for name in PART_NAMES if name in index["parts"]},
        "sampling": index["sampling"],
    }
    write_yaml(folder / INDEX_FILE, ordered)


def _read_index(path: Path) -> dict[str, Any]:
    """Reads tessera.yaml and checks its shape, so that the rest can take it for granted."""
    if not path.exists():
        raise UserError(f"{path}: no such model folder")
    if not path.is_dir():
        raise UserError(f"{path} is a file; a model is a folder with {INDEX_FILE} in it")
    if not (path / INDEX_FILE).is_file():
        inner = sorted(path.glob(f"*/{INDEX_FILE}"))
        hint = f"; did you mean {inner[0].parent}?" if inner else ""
        raise UserError(f"{path} is not a model folder: it has no {INDEX_FILE}{hint}")
    content = read_yaml(path / INDEX_FILE)
    version = content.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise UserError(
            f"{path / INDEX_FILE}: format version {version!r} is unknown, this tessera ({tessera.__version__}) reads "
            f"version {FORMAT_VERSION}: train an older model again; a newer tessera may read a newer one"
        )
    index: dict[str, Any] = {"parts": {}, "sampling": {}}
    try:
        if "tokenizer" in content:
            index["tokenizer"] = _typed_fingerprint(content["tokenizer"])
        for name, part in dict(content["parts"]).items():
            if name not in PART_NAMES:
                raise ValueError(f"unknown part {name!r}")
            index["parts"][name] = {
                "sha256": str(part["sha256"]),
                "requires": {str(key): str(value) for key, value in dict(part["requires"]).items()},
                "files": {file: _typed_fingerprint(part["files"][file]) for file in PART_FILES},
                "metadata": dict(part["metadata"]),
            }
        index["sampling"] = dict(content["sampling"])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path / INDEX_FILE} is damaged: {problem}; copy the model again") from error
    return index


def _typed_fingerprint(value: Any) -> dict[str, Any]:
    return {"sha256": str(value["sha256"]), "bytes": int(value["bytes"])}


def _check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    file = folder / name
    if not file.is_file():
        raise UserError(f"{file} is missing; copy the model again or export this part again")
    size = file.stat().st_size
    if size < expected["bytes"]:
        raise UserError(f"{file} is truncated: {size:,} of {expected['bytes']:,} bytes; copy it again")
    actual = _fingerprint(file)
    if actual != expected:
        raise UserError(
            f"{file} was changed: expected sha256 {short_sha256(expected['sha256'])}..., found "
            f"{short_sha256(actual['sha256'])}...; copy it again"
        )


def _check_requirements(folder: Path, index: Mapping[str, Any], all_parts: Mapping[str, Any]) -> None:
    found = {name: part["sha256"] for name, part in all_parts.items()}
    if "tokenizer" in index:
        found["tokenizer"] = index["tokenizer"]["sha256"]
    for name, part in index["parts"].items():
        for needed, expected in part["requires"].items():
            if needed not in found:
                raise UserError(
                    f"{folder}: {name} was trained with a {needed} (sha256 {short_sha256(expected)}...) that is not "
                    f"in the folder; add it, or train {name} again"
                )
            if found[needed] != expected:
                raise UserError(
                    f"{folder}: {name} was trained with another {needed}: expected sha256 {short_sha256(expected)}..., "
                    f"found {short_sha256(found[needed])}...; put that {needed} back, or train {name} again"
                )


def _check_name(name: str) -> None:
    if name not in PART_NAMES:
        raise ValueError(f"a part is one of {', '.join(PART_NAMES)}, got {name!r}")


def _no_part(path: Path, name: str, present: Collection[str]) -> str:
    having = f"it has {', '.join(present)}" if present else "it has none yet"
    return f"{path} has no {name} ({having}); `tessera {_TRAINED_BY[name]}` makes one"


def _fingerprint(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": file.stat().st_size}


def _part_sha256(files: Mapping[str, Any]) -> str:
    return hashlib.sha256("".join(f"{file} {files[file]['sha256']}\n" for file in PART_FILES).encode()).hexdigest()


def _independent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors; those that share memory (tied weights) are copied, which safetensors demands."""
    seen: set[int] = set()
    independent = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        independent[key] = tensor
    return independent

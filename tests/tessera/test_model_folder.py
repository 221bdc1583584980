import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.errors import UserError
from tessera.model_folder import (
    ModelFolder,
    write_card,
    write_part,
    write_sampling_defaults,
    write_tokenizer,
)
from tessera.plain_yaml import read_yaml, write_yaml

TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "half": torch.arange(5).to(torch.bfloat16)}


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "my-model"
    tokenizer = write_tokenizer(folder, b"sentencepiece bytes")
    dvae = write_part(folder, "dvae", config={"levels": (8, 8)}, tensors=TENSORS, metadata={"psnr": np.float64(26.5)})
    write_part(folder, "prior", config={"dim": 8}, tensors=TENSORS, requires={"dvae": dvae, "tokenizer": tokenizer})
    write_part(folder, "scorer", config={"dim": 4}, tensors=TENSORS, requires={"tokenizer": tokenizer})
    write_sampling_defaults(folder, {"temperature": 0.5, "top_k": None})
    return folder


def refused(folder: Path, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        ModelFolder.open(folder, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_index(folder: Path, edit) -> None:
    index = read_yaml(folder / "tessera.yaml")
    edit(index)
    write_yaml(folder / "tessera.yaml", index)


def test_what_is_written_is_read(model):
    folder = ModelFolder.open(model)
    assert folder.parts == ("dvae", "prior", "scorer")
    assert folder.has("prior")
    assert folder.config("dvae") == {"levels": [8, 8]}
    assert folder.metadata("dvae") == {"psnr": 26.5}
    assert folder.tokenizer_proto() == b"sentencepiece bytes"
    assert folder.requires("prior") == {"dvae": folder.part_sha256("dvae"), "tokenizer": folder.tokenizer_sha256}
    assert folder.sampling_defaults() == {"temperature": 0.5, "top_k": None}
    assert len(folder.sha256) == 64


def test_tensors_keep_values_and_dtypes(model):
    tensors = ModelFolder.open(model).tensors("dvae")
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_tensors_that_share_memory_are_all_written(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tied = {"embedding": weight, "head": weight, "transposed": weight.t(), "row": weight[1], "empty": torch.empty(0, 4)}
    write_part(tmp_path / "m", "dvae", config={}, tensors=tied)
    read = ModelFolder.open(tmp_path / "m").tensors("dvae")
    for name, tensor in tied.items():
        assert torch.equal(read[name], tensor)


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    write_part(tmp_path / "m", "dvae", config={}, tensors={"row": torch.zeros(1000, 100)[3]})
    assert (tmp_path / "m/dvae/model.safetensors").stat().st_size < 1000


def test_the_same_content_has_the_same_hash_and_other_content_another(model, tmp_path):
    first = ModelFolder.open(model)
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    write_card(copy, "# A card\n")
    write_sampling_defaults(copy, {"temperature": 1.0})
    assert ModelFolder.open(copy).sha256 == first.sha256
    changed = write_part(copy, "scorer", config={"dim": 5}, tensors=TENSORS)
    assert changed != first.part_sha256("scorer")
    assert ModelFolder.open(copy).sha256 != first.sha256


def test_a_folder_can_grow_part_by_part(tmp_path):
    sha256 = write_part(tmp_path / "m", "dvae", config={}, tensors=TENSORS)
    folder = ModelFolder.open(tmp_path / "m")
    assert folder.parts == ("dvae",) and not folder.has("prior") and not folder.has_tokenizer
    with pytest.raises(UserError, match="has no text tokenizer"):
        folder.tokenizer_proto()
    with pytest.raises(UserError, match=r"m has no prior \(it has dvae\); `tessera train-prior` makes one"):
        folder.config("prior")
    write_part(tmp_path / "m", "prior", config={}, tensors=TENSORS, requires={"dvae": sha256})
    assert ModelFolder.open(tmp_path / "m").parts == ("dvae", "prior")


def test_part_names_are_fixed(tmp_path):
    with pytest.raises(ValueError, match=r"one of dvae, prior, scorer, got '\.\./x'"):
        write_part(tmp_path / "m", "../x", config={}, tensors=TENSORS)


def test_the_folder_holds_nothing_else(model):
    names = sorted(str(path.relative_to(model)) for path in model.rglob("*") if path.is_file())
    parts = [f"{part}/{file}" for part in ("dvae", "prior", "scorer") for file in ("config.yaml", "model.safetensors")]
    assert names == [*parts, "tessera.yaml", "tokenizer.model"]


FILES = ["tokenizer.model", "dvae/config.yaml", "prior/model.safetensors", "scorer/config.yaml"]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_is_found(model, file):
    content = bytearray((model / file).read_bytes())
    content[-1] ^= 1
    (model / file).write_bytes(content)
    assert refused(model).startswith(f"{model / file} was changed: expected sha256 ")


@pytest.mark.parametrize("file", FILES)
def test_a_truncated_file_is_found(model, file):
    content = (model / file).read_bytes()
    (model / file).write_bytes(content[:-1])
    assert refused(model).startswith(
        f"{model / file} is truncated: {len(content) - 1} of {len(content)} bytes; copy it again"
    )


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_found(model, file):
    (model / file).unlink()
    assert refused(model).startswith(f"{model / file} is missing")


def test_bytes_added_to_a_file_are_found(model):
    with open(model / "dvae/model.safetensors", "ab") as file:
        file.write(b"x")
    assert "dvae/model.safetensors was changed" in refused(model)


def test_a_part_of_another_model_is_found(model, tmp_path):
    write_part(tmp_path / "other", "dvae", config={"levels": (4, 4)}, tensors=TENSORS)
    shutil.rmtree(model / "dvae")
    shutil.copytree(tmp_path / "other/dvae", model / "dvae")
    assert "dvae/config.yaml was changed" in refused(model)


def test_a_part_trained_with_another_one_is_refused_by_name(model):
    before = ModelFolder.open(model).part_sha256("dvae")
    after = write_part(model, "dvae", config={"levels": (4, 4)}, tensors=TENSORS)
    assert refused(model) == (
        f"{model}: prior was trained with another dvae: expected sha256 {before[:12]}..., found {after[:12]}...; "
        f"put that dvae back, or train prior again"
    )
    # While the prior is trained again, the new dvae must be usable.
    assert ModelFolder.open(model, parts=["dvae"]).parts == ("dvae",)


def test_a_part_trained_with_another_tokenizer_is_refused_by_name(model):
    write_tokenizer(model, b"another")
    assert "prior was trained with another tokenizer: expected sha256 " in refused(model)


def test_a_part_whose_need_is_absent_is_refused(model):
    edit_index(model, lambda index: index["parts"].pop("dvae"))
    assert "prior was trained with a dvae" in refused(model)
    assert "that is not in the folder" in refused(model)


def test_only_the_parts_asked_for_are_checked(model):
    (model / "prior/model.safetensors").unlink()
    folder = ModelFolder.open(model, parts=["dvae", "scorer"])
    assert folder.parts == ("dvae", "scorer")
    with pytest.raises(UserError, match="has no prior"):
        folder.tensors("prior")
    assert "prior/model.safetensors is missing" in refused(model, parts=["prior"])


def test_a_part_asked_for_must_be_there(tmp_path):
    write_part(tmp_path / "m", "dvae", config={}, tensors=TENSORS)
    assert "m has no scorer (it has dvae); `tessera train-scorer` makes one" in refused(
        tmp_path / "m", parts=["scorer"]
    )


@pytest.mark.parametrize("version", [1, 2, 4, 0, "3", None, True, [3]])
def test_an_unknown_format_version_is_refused(model, version):
    edit_index(model, lambda index: index.update(format_version=version))
    assert f"format version {version!r} is unknown" in refused(model)


def test_what_is_no_model_folder_is_refused(tmp_path, model):
    assert refused(tmp_path / "absent") == f"{tmp_path / 'absent'}: no such model folder"
    assert refused(tmp_path) == (f"{tmp_path} is not a model folder: it has no tessera.yaml; did you mean {model}?")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").endswith("it has no tessera.yaml")
    assert "is a file; a model is a folder" in refused(model / "tessera.yaml")


@pytest.mark.parametrize(
    "edit",
    [
        lambda index: index.pop("parts"),
        lambda index: index.update(parts=[1, 2]),
        lambda index: index.update(parts={"../../etc": {}}),
        lambda index: index.update(sampling=3),
        lambda index: index["tokenizer"].pop("sha256"),
        lambda index: index["tokenizer"].update(bytes="many"),
        lambda index: index["parts"]["dvae"].pop("files"),
        lambda index: index["parts"]["dvae"]["files"].pop("config.yaml"),
        lambda index: index["parts"]["dvae"].update(sha256="0" * 64),
        lambda index: index["parts"].update(dvae=None),
    ],
)
def test_a_damaged_index_is_refused(model, edit):
    edit_index(model, edit)
    assert f"{model / 'tessera.yaml'} is damaged" in refused(model)


def test_an_index_of_another_kind_is_refused(model):
    (model / "tessera.yaml").write_text("!!python/object/apply:os.system ['exit 1']")
    assert "tessera.yaml: line 1: not plain YAML" in refused(model)


def test_what_is_no_safetensors_file_is_refused_even_with_the_right_hash(model):
    import hashlib

    content = b"\x80\x04 a pickle"
    (model / "dvae/model.safetensors").write_bytes(content)

    def edit(index):
        part = index["parts"]["dvae"]
        part["files"]["model.safetensors"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        lines = "".join(f"{file} {entry['sha256']}\n" for file, entry in part["files"].items())
        part["sha256"] = hashlib.sha256(lines.encode()).hexdigest()

    edit_index(model, edit)
    folder = ModelFolder.open(model, parts=["dvae"])
    with pytest.raises(UserError, match=r"dvae/model\.safetensors: not a safetensors file"):
        folder.tensors("dvae")


def test_a_writer_that_fails_leaves_the_part_as_it_was(model, monkeypatch):
    before = ModelFolder.open(model).sha256

    def fail(tensors, path, **kwargs):
        Path(path).write_bytes(b"half of the ten")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_part(model, "dvae", config={"levels": (4, 4)}, tensors=TENSORS)
    folder = ModelFolder.open(model)
    assert folder.sha256 == before
    assert sorted(path.name for path in (model / "dvae").iterdir()) == ["config.yaml", "model.safetensors"]


def test_what_a_killed_writer_left_is_cleared_away(model):
    stale = model / "dvae" / ".model.safetensors.12345.tmp"
    stale.write_bytes(b"half")
    write_part(model, "dvae", config={}, tensors=TENSORS)
    assert not stale.exists()


def test_a_file_is_no_place_for_a_model(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match="taken is a file, a model folder cannot be written there"):
        write_tokenizer(tmp_path / "taken", b"x")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_of_an_unknown_version_is_not_written_into(model):
    edit_index(model, lambda index: index.update(format_version=99))
    with pytest.raises(UserError, match="format version 99 is unknown"):
        write_part(model, "dvae", config={}, tensors=TENSORS)


def test_metadata_is_plain(tmp_path):
    with pytest.raises(TypeError, match="plain values only"):
        write_part(tmp_path / "m", "dvae", config={}, tensors=TENSORS, metadata={"loss": torch.tensor(1.0)})
    write_part(tmp_path / "m", "dvae", config={}, tensors=TENSORS, metadata={"curve": (1, 2.5), "name": "日本"})
    assert json.loads(json.dumps(ModelFolder.open(tmp_path / "m").metadata("dvae"))) == {
        "curve": [1, 2.5],
        "name": "日本",
    }

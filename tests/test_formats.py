"""What earlier releases wrote is read today, with the same result; what a later one writes is refused in one line."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sampling.pipeline import Pipeline
from tessera.data import shards
from tessera.data.manifest import MANIFEST_NAME, MANIFEST_VERSION, Manifest
from tessera.data.shards import TokenShards
from tessera.errors import UserError
from tessera.model_folder import FORMAT_VERSION, ModelFolder
from tessera.plain_yaml import read_yaml, write_yaml
from tessera.text_tokenizer import TextTokenizer
from tessera.training import checkpoint
from tessera.training.checkpoint import AtomicCheckpointIO, CheckpointError, newest_valid

FIXTURES = Path(__file__).parent / "fixtures"
FORMATS = FIXTURES / "formats"


def fixtures(kind: str) -> list[Path]:
    return sorted(path for path in FORMATS.glob(f"{kind}-*") if path.is_dir())


def expected(fixture: Path) -> dict[str, Any]:
    return json.loads(fixture.with_name(f"{fixture.name}.json").read_text(encoding="utf-8"))


def by_name(path: Path) -> str:
    return path.name


@pytest.fixture(scope="module")
def make_formats() -> ModuleType:
    """The script that wrote the fixtures, for the training that its checkpoint is from."""
    specification = importlib.util.spec_from_file_location("make_formats", FIXTURES / "make_formats.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_format_of_today_has_a_fixture() -> None:
    for kind, version in (
        ("model", FORMAT_VERSION),
        ("shards", shards.FORMAT_VERSION),
        ("checkpoint", checkpoint.FORMAT_VERSION),
        ("manifest", MANIFEST_VERSION),
    ):
        assert FORMATS / f"{kind}-{version}" in fixtures(kind), "see tests/fixtures/make_formats.py"


def test_the_fixtures_are_small() -> None:
    for kind in ("model", "shards", "checkpoint", "manifest"):
        for fixture in fixtures(kind):
            num_bytes = sum(file.stat().st_size for file in fixture.rglob("*") if file.is_file())
            assert num_bytes <= 300 * 2**10, fixture.name  # of which a tokenizer takes 246: its normalization table


@pytest.mark.parametrize("fixture", fixtures("model"), ids=by_name)
def test_a_model_draws_what_it_drew(fixture: Path) -> None:
    then = expected(fixture)
    folder = ModelFolder.open(fixture)
    assert folder.parts == ("dvae", "prior", "scorer")
    assert folder.sampling_defaults() == {"temperature": 0.9, "guidance": 2.0}
    assert TextTokenizer(folder.tokenizer_proto()).encode(then["prompt"]) == then["text_ids"]
    pipe = Pipeline.load(fixture, device="cpu", precision="fp32")
    (image,) = pipe(then["prompt"], n=1, best_of=2, seed=then["seed"], scorer="clip")
    assert image.codes.tolist() == then["codes"]
    assert image.image_index == then["image_index"]
    assert image.scores["clip"] == pytest.approx(then["score"], abs=1e-3)
    assert image.image.mean(axis=(0, 1)).tolist() == pytest.approx(then["mean_color"], abs=1.0)


@pytest.mark.parametrize("fixture", fixtures("shards"), ids=by_name)
def test_token_shards_hold_what_they_held(fixture: Path) -> None:
    then = expected(fixture)
    tokens = TokenShards(fixture)
    assert tokens.codes.tolist() == then["codes"]
    assert [list(tokens.captions(row)) for row in range(len(tokens))] == then["captions"]
    assert tokens.index.crops == then["crops"]


@pytest.mark.parametrize("fixture", fixtures("checkpoint"), ids=by_name)
def test_training_goes_on_from_a_checkpoint_as_it_did(fixture: Path, tmp_path: Path, make_formats: ModuleType) -> None:
    shutil.copytree(fixture, tmp_path / "checkpoints")
    valid, damaged = newest_valid(tmp_path / "checkpoints")
    assert valid is not None and damaged == []
    losses = make_formats.train(tmp_path)
    assert losses == pytest.approx(expected(fixture)["losses"], rel=1e-4)


@pytest.mark.parametrize("fixture", fixtures("manifest"), ids=by_name)
def test_a_manifest_says_what_it_said(fixture: Path, tmp_path: Path) -> None:
    then = expected(fixture)
    folder = shutil.copytree(fixture, tmp_path / "manifest")  # where the index is made again
    manifest = Manifest.read(folder / MANIFEST_NAME)
    assert manifest.summary() == then["summary"] and manifest.header.content == then["content"]
    assert [record.location.name for record in manifest.records] == then["names"]
    assert [list(record.captions) for record in manifest.records] == then["captions"]
    assert manifest.of_split("validation").tolist() == then["validation"]
    assert [list(refusal) for refusal in (*manifest.rejects, *manifest.duplicates)] == then["refused"]


def test_a_model_of_a_later_format_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = shutil.copytree(FORMATS / f"model-{FORMAT_VERSION}", tmp_path / "model")
    index = read_yaml(folder / "tessera.yaml")
    write_yaml(folder / "tessera.yaml", {**index, "format_version": FORMAT_VERSION + 1})
    with pytest.raises(UserError, match=rf"^.*/tessera\.yaml: format version {FORMAT_VERSION + 1} is unknown, .*newer"):
        ModelFolder.open(folder)


def test_token_shards_of_a_later_format_are_refused_in_one_line(tmp_path: Path) -> None:
    version = shards.FORMAT_VERSION
    folder = shutil.copytree(FORMATS / f"shards-{version}", tmp_path / "shards")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format_version": version + 1, "a_new_field": 1}))
    with pytest.raises(UserError, match=rf"^.*/index\.json has format version {version + 1}; .* reads {version}: .*$"):
        TokenShards(folder)


def test_a_manifest_of_a_later_format_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = shutil.copytree(FORMATS / f"manifest-{MANIFEST_VERSION}", tmp_path / "manifest")
    path = folder / MANIFEST_NAME
    header, _, rest = path.read_text().partition("\n")
    later = {**json.loads(header), "tessera_manifest": MANIFEST_VERSION + 1, "a_new_field": 1}
    path.write_text(json.dumps(later) + "\n" + rest)
    with pytest.raises(
        UserError, match=rf"^.*{MANIFEST_NAME} is a manifest of version {MANIFEST_VERSION + 1}, .*newer.*$"
    ):
        Manifest.read(path)


def test_a_checkpoint_of_a_later_format_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = checkpoint.FORMAT_VERSION
    (now,) = (FORMATS / f"checkpoint-{version}").glob("*.ckpt")
    content = AtomicCheckpointIO().load_checkpoint(now)
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT_VERSION", version + 1)
        AtomicCheckpointIO().save_checkpoint(content, tmp_path / now.name)
    with pytest.raises(CheckpointError, match=rf"^.*{now.name} is a checkpoint of format {version + 1}, .*$"):
        newest_valid(tmp_path)

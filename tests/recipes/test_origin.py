"""What a fit takes from the model folder that it goes on from, and that it never writes to it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.origin import caption_line, check_apart, count_captions, open_base, take_over
from tessera.errors import UserError
from tessera.model_folder import PART_FILES, TOKENIZER_FILE, ModelFolder, write_part


def test_sizes_come_from_the_folder_and_the_image_size_from_the_prior(scenes_model: Path) -> None:
    base = open_base(scenes_model)
    assert base.image_size == (16, 16)
    assert base.vae.levels == (5, 3) and base.prior.layout.text_len == 24
    assert base.scorer is not None and base.scorer.image_size == (16, 16)
    assert base.origin.parts == ("dvae", "prior", "scorer")
    assert base.origin.sha256 == ModelFolder.open(scenes_model).sha256


def test_a_scorer_for_pictures_of_another_size_is_left_out(scenes_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(scenes_model, tmp_path / "m"))
    folder = ModelFolder.open(model)
    config = {**folder.config("scorer"), "image_size": [32, 32]}
    write_part(model, "scorer", config=config, tensors=folder.tensors("scorer"), requires=folder.requires("scorer"))
    base = open_base(model)
    assert base.scorer is None and base.origin.parts == ("dvae", "prior")


def test_a_folder_that_is_missing_or_has_no_prior_is_refused(scenes_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--from .*absent: no such model folder"):
        open_base(tmp_path / "absent")
    take_over(open_base(scenes_model).origin, tmp_path / "dvae-only")
    with pytest.raises(UserError, match="it has no prior"):
        open_base(tmp_path / "dvae-only")


def test_what_is_frozen_is_copied_byte_for_byte_and_nothing_else(scenes_model: Path, tmp_path: Path) -> None:
    take_over(open_base(scenes_model).origin, tmp_path / "m")
    files = [TOKENIZER_FILE, *(f"dvae/{file}" for file in PART_FILES)]
    for file in files:
        assert (tmp_path / "m" / file).read_bytes() == (scenes_model / file).read_bytes()
    taken, source = ModelFolder.open(tmp_path / "m"), ModelFolder.open(scenes_model)
    assert taken.parts == ("dvae",) and taken.part_sha256("dvae") == source.part_sha256("dvae")
    assert taken.sampling_defaults() == {}


def test_a_dvae_that_will_be_trained_on_is_not_copied(scenes_model: Path, tmp_path: Path) -> None:
    take_over(open_base(scenes_model, train_dvae=True).origin, tmp_path / "m")
    taken = ModelFolder.open(tmp_path / "m")
    assert taken.parts == () and taken.tokenizer_sha256 == ModelFolder.open(scenes_model).tokenizer_sha256


def test_taking_over_again_keeps_what_was_trained_since(scenes_model: Path, tmp_path: Path) -> None:
    origin, source = open_base(scenes_model).origin, ModelFolder.open(scenes_model)
    take_over(origin, tmp_path / "m")
    write_part(tmp_path / "m", "prior", config=source.config("prior"), tensors=source.tensors("prior"))
    take_over(origin, tmp_path / "m")
    assert ModelFolder.open(tmp_path / "m").parts == ("dvae", "prior")


def test_an_origin_that_was_damaged_since_is_not_copied(scenes_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(scenes_model, tmp_path / "m"))
    origin = replace(open_base(model).origin, path=str(model))
    (model / "dvae" / "config.yaml").write_text("quantizer: fsq\n")
    with pytest.raises(UserError, match=r"dvae/config\.yaml"):
        take_over(origin, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("written", ["m", "m/new", "m/../m", "."])
def test_a_model_is_never_written_to(written: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="is only read"):
        check_apart(str(tmp_path / "m"), tmp_path / "other", tmp_path / written)
    check_apart(str(tmp_path / "m"), tmp_path / "other", tmp_path / "m.run")


def test_captions_with_unknown_characters_and_long_ones_are_counted(scenes_model: Path) -> None:
    tokenizer = open_base(scenes_model).tokenizer
    captions = ["a red star", "a red star", "a red 猫", "a small green ring left of a large blue square", "a star é 猫"]
    assert count_captions(captions, tokenizer, text_len=24) == (4, 2, 0)
    counts = count_captions(captions, tokenizer, text_len=5)
    assert counts.cut == sum(len(tokenizer.encode(caption)) > 5 for caption in set(captions)) > 0
    assert "of 4 different captions, 2 have" in caption_line(counts, text_len=5)
    assert count_captions([], tokenizer, text_len=5) == (0, 0, 0)

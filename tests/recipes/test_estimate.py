"""`tessera estimate` finds out which stage is meant, and passes on what is asked."""

import pytest

from recipes.estimate import main, stage_of
from tessera.errors import UserError, run_command

DVAE = ["data.image_size=[16,24]", "model.widths=[8,16]", "model.blocks=[0,1]", "trainer.batch_size=2"]
PRIOR = ["model.dim=16", "model.depth=1", "model.heads=2", "trainer.batch_size=2"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.estimate_timing._SECONDS", 0.02)
    monkeypatch.setattr("recipes.estimate_timing._ENOUGH_SECONDS", 0.0)


@pytest.mark.parametrize("file", ["dvae/5m", "dvae/openai", "dvae/emoji", "prior/50m", "prior/scenes", "prior/dalle"])
def test_a_file_tells_the_stage_by_its_keys(file: str) -> None:
    assert stage_of([f"configs/{file}.yaml"]) == file.split("/")[0]


def test_overrides_tell_the_stage_where_no_file_does() -> None:
    assert stage_of(["trainer.batch_size=2", "model.layout.text_len=64"]) == "prior"
    assert stage_of(["data.image_size=[64,64]"]) == "dvae"


@pytest.mark.parametrize("settings", [[], ["trainer.batch_size=3"], ["configs/scorer/scenes.yaml"], ["model.width=3"]])
def test_settings_that_do_not_tell_the_stage_are_refused_with_what_is_missing(settings: list[str]) -> None:
    with pytest.raises(UserError, match="tessera estimate prior model.dim=512"):
        stage_of(settings)


def test_a_first_word_names_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prior", *PRIOR[-1:], "--device-memory", "80"]) == 0
    assert "image positions" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"unknown key 'data.image_size'"):
        main(["prior", *DVAE])


def test_the_command_measures_a_dvae(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(DVAE) == 0
    assert "images/s" in capsys.readouterr().out


def test_the_command_measures_a_prior(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--processes", "2", *PRIOR]) == 0
    shown = capsys.readouterr().out
    assert "s per step (estimated for 2 processes" in shown
    assert "2 processes, fsdp" in shown


def test_the_command_estimates_a_prior_for_another_device(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["configs/prior/1300m.yaml", "--device-flops", "989", "--device-memory=139", "trainer.max_steps=10"]
    assert main([*argv, "--utilization", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "989 TFLOP/s used to 50% and 139 GiB" in shown
    assert "10 steps of 512" in shown
    assert "measured" not in shown


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="divisible by 8"):
        main(["data.image_size=[20,24]"])
    with pytest.raises(UserError, match="are for priors"):
        main(["configs/dvae/5m.yaml", "--processes", "2"])
    assert run_command(main, ["prior", "model.width=3"]) == 2
    assert run_command(main, ["configs/prior/5m.yaml", "--processes=many"]) == 2
    assert capsys.readouterr().err.count("\n") == 2

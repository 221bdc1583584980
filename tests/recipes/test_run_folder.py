from dataclasses import replace
from pathlib import Path

import pytest

from recipes.origin import Origin
from recipes.plan import Plan
from recipes.plan_sizes import DataFacts
from recipes.run_folder import Request, RunFolder, Stored, start_over
from recipes.tune import Trial, Tuned
from tessera.errors import UserError
from tessera.plain_yaml import write_yaml

REQUEST = Request(path="scenes", minutes=3.0, overrides=("dvae.flip=true",))
FACTS = DataFacts(name="scenes", num_images=5, image_size=(64, 64), text_len=8)


def planned(folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.write_plan(Stored(REQUEST, Plan(minutes=3.0), FACTS, "abc"))
    return run


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    assert planned(tmp_path / "run").read_plan() == Stored(REQUEST, Plan(minutes=3.0), FACTS, "abc")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"minutes": 4.0}, "begun with minutes 3, now it is 4"),
        ({"path": "emoji"}, "begun with path scenes, now it is emoji"),
        ({"overrides": ()}, "begun with overrides dvae.flip=true, now it is none"),
    ],
)
def test_another_request_is_refused_and_told_what_to_do(tmp_path: Path, change: dict, message: str) -> None:
    run = planned(tmp_path / "run")
    run.check_request(REQUEST)
    with pytest.raises(UserError, match=f"{message}: choose another --out, or start over with --fresh"):
        run.check_request(replace(REQUEST, **change))


CONTINUED = replace(REQUEST, init_from="/models/m", init_sha256="a" * 64)


def test_a_plan_that_goes_on_from_a_model_is_read_back(tmp_path: Path) -> None:
    run, origin = RunFolder(tmp_path), Origin(path="/models/m", sha256="a" * 64, parts=("dvae", "prior"))
    run.write_plan(Stored(CONTINUED, Plan(minutes=3.0, origin=origin), FACTS, "abc"))
    assert run.read_plan().request == CONTINUED and run.read_plan().plan.origin == origin


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init_sha256": "b" * 64}, "--from /models/m has changed: expected sha256 aaaaaaaaaaaa"),
        ({"init_from": "/models/n", "init_sha256": "b" * 64}, "begun with init_from /models/m, now it is /models/n"),
        ({"train_dvae": True}, "begun with train_dvae False, now it is True"),
    ],
)
def test_another_model_to_go_on_from_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    run = RunFolder(tmp_path)
    run.write_plan(Stored(CONTINUED, Plan(minutes=3.0), FACTS, "abc"))
    run.check_request(CONTINUED)
    with pytest.raises(UserError, match=message):
        run.check_request(replace(CONTINUED, **change))


def test_training_on_a_dvae_needs_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name it with --from"):
        Request(path="scenes", train_dvae=True)


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    write_yaml(tmp_path / "run" / "plan.yaml", {"request": {"path": "scenes"}})
    assert run.read_request() == Request(path="scenes")
    with pytest.raises(UserError, match=r"plan\.yaml is damaged: it has no 'plan'; start over"):
        run.read_plan()


def test_tuning_is_read_back(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    assert run.read_tuning() is None
    tuned = Tuned({"temperature": 0.5}, "by hand", [Trial(0.5, 1.0, 0.7, 12)])
    run.write_tuning(tuned)
    assert run.read_tuning() == tuned


def test_a_project_that_has_a_data_folder_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not what an earlier fit made"):
        start_over(tmp_path / "m", tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_starting_over_deletes_what_a_fit_made_and_nothing_else(tmp_path: Path) -> None:
    out, run_dir, photos = tmp_path / "m", tmp_path / "m.run", tmp_path / "photos"
    out.mkdir()
    (out / "tessera.yaml").write_text("")
    planned(run_dir)
    photos.mkdir()
    (photos / "cat.png").write_text("")
    with pytest.raises(UserError, match="not what an earlier fit made"):
        start_over(photos, run_dir)
    assert run_dir.exists() and (photos / "cat.png").exists()
    (run_dir / "data").mkdir()
    start_over(out, run_dir)
    assert not out.exists() and [entry.name for entry in run_dir.iterdir()] == ["data"]
    start_over(out, run_dir)

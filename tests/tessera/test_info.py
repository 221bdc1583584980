import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tessera.__main__ import main as tessera_main
from tessera.data.ingest import ingest
from tessera.info import main
from tessera.model_folder import ModelFolder, write_part, write_sampling_defaults, write_tokenizer
from tessera.plain_yaml import read_yaml, write_yaml
from tessera.text_tokenizer import TextTokenizer
from tessera.training.checkpoint import AtomicCheckpointIO, checkpoint_path

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"
WEIGHTS = {"weight": torch.zeros(40, 25)}
LAYOUT = {"text_len": 16, "grid_height": 3, "grid_width": 5, "text_vocab_size": 270, "codebook_size": 64}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "my-model"
    tokenizer = TextTokenizer.train(["a red star", "a blue ring"], vocab_size=270)
    write_tokenizer(folder, tokenizer.proto)
    tensors = {"w": torch.zeros(30, 50), "b": torch.zeros(7, dtype=torch.bfloat16), "scalar": torch.zeros(())}
    metadata = {"figures": {"psnr": 26.512345, "codebook_usage": float("nan")}}
    sha256 = write_part(folder, "dvae", config={"levels": [8, 8]}, tensors=tensors, metadata=metadata)
    write_part(folder, "prior", config={"layout": LAYOUT}, tensors=tensors, requires={"dvae": sha256})
    write_sampling_defaults(folder, {"temperature": 0.5, "guidance": 2})
    return folder


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, of which the newer is cut short."""
    folder = tmp_path / "run"
    for step in (200, 1000):
        content = {"global_step": step, "callbacks": {"ProgressClock": {"seconds": step / 2}}, "state_dict": WEIGHTS}
        AtomicCheckpointIO().save_checkpoint(content, checkpoint_path(folder / "checkpoints", step))
    with checkpoint_path(folder / "checkpoints", 1000).open("rb+") as file:
        file.truncate(999)
    (folder / "config.yaml").write_text(
        "config:\n  model:\n    width: 8\n  trainer: {max_steps: 5000}\ninputs: {corpus: abc}\n"
    )
    for start, rows in (("000000000", "0,3.5,100,\n0,,200,3.25\n"), ("000000200", "0,3.0,300,\n")):
        (folder / "metrics" / f"from-step-{start}").mkdir(parents=True)
        (folder / "metrics" / f"from-step-{start}" / "metrics.csv").write_text(f"epoch,loss,step,val_loss\n{rows}")
    return folder


@pytest.fixture
def fit(tmp_path):
    """A fit whose dVAE is done and whose codes are being made."""
    folder = tmp_path / "my-model.run"
    stages = {name: {"trainer": {"max_steps": 500}} for name in ("dvae", "prior", "scorer")}
    for name in ("dvae", "prior", "shards"):
        (folder / name).mkdir(parents=True)
    write_yaml(folder / "plan.yaml", {"request": {"path": "scenes", "seed": 3}, "plan": {"minutes": 20.0, **stages}})
    (folder / "seconds.json").write_text('{"total": 90.0}')
    (folder / "dvae" / "finished.json").write_text('{"steps": 480}')
    (folder / "shards" / "journal.json").write_text('{"complete": 64, "index": {"num_samples": 1000}}')
    return folder


def test_a_model_folder_as_text(model, capsys):
    assert main([str(model)]) == 0
    text = capsys.readouterr().out
    assert f"sha256 {ModelFolder.open(model).sha256[:12]}, format 3" in text
    assert "dvae      1.5 k parameters, 6." in text
    assert "grid 3 x 5 (rows x columns), 64 codes" in text
    assert "16 positions, 270 pieces" in text
    assert "sampling  temperature=0.5, guidance=2" in text
    assert "dvae: figures.psnr = 26.5123" in text


def test_a_model_folder_as_json(model, capsys):
    assert main([str(model), "--json"]) == 0
    description = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert description["kind"] == "model"
    assert description["parts"]["dvae"]["parameters"] == 30 * 50 + 7 + 1
    assert description["parts"]["dvae"]["metadata"]["figures"] == {"psnr": 26.512345, "codebook_usage": None}
    assert description["parts"]["prior"]["requires"] == {"dvae": description["parts"]["dvae"]["sha256"]}
    assert description["layout"] == LAYOUT
    assert description["tokenizer"]["pieces"] == TextTokenizer(ModelFolder.open(model).tokenizer_proto()).vocab_size
    assert description["sampling"] == {"temperature": 0.5, "guidance": 2}
    assert description["bytes"] == sum(part["bytes"] for part in description["parts"].values())


def test_a_run_folder_says_which_checkpoints_are_whole(run, capsys):
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert f"run folder {run}, not finished\n" in text
    assert re.search(r"checkpoint of step 200: [\d.]+ KiB, whole\n", text)
    assert re.search(r"checkpoint of step 1,000: 999 bytes, damaged, truncated: 999 of [\d,]+ bytes\n", text)
    assert "last record at step 300 of 5,000" in text
    assert "100 s of training" in text, "as the newest whole checkpoint knows it"
    assert " loss = 3\n" in text and "val_loss = 3.25" in text and "model.width: 8" in text and "corpus: abc" in text


def test_a_run_folder_as_json(run, capsys):
    assert main([str(run), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["kind"] == "run"
    assert [(each["step"], each["damage"] is None) for each in description["checkpoints"]] == [
        (200, True),
        (1000, False),
    ]
    assert description["metrics"] == {"loss": 3.0, "val_loss": 3.25}
    assert description["step"] == 300 and description["max_steps"] == 5000 and not description["finished"]


def test_a_finished_run_says_how_long_it_took(run, capsys):
    (run / "finished.json").write_text('{"steps": 5000, "seconds": 1234.5}')
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert f"run folder {run}, finished\n" in text and "1,234 s of training" in text


def test_a_fit_says_how_far_each_stage_is(fit, capsys):
    assert main([str(fit)]) == 0
    text = capsys.readouterr().out
    assert f"run folder of a fit {fit}, not finished" in text
    assert "20 minutes, 1.5 of them spent" in text
    assert "dvae      finished, 480 of 500 steps" in text
    assert "encode    begun, 64 of 1,000 samples" in text
    assert "prior     not begun\n" in text and "tuning    not begun\n" in text
    assert "path: scenes" in text
    assert main([str(fit), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert list(stages) == ["dvae", "encode", "prior", "scorer", "tuning"]
    assert stages["encode"] == {"state": "begun", "done": 64, "of": 1000, "unit": "samples"}


def test_a_fit_from_a_model_takes_its_dvae_over(fit, capsys):
    content = read_yaml(fit / "plan.yaml")
    content["plan"]["origin"] = {"path": "/models/m", "train_dvae": False}
    write_yaml(fit / "plan.yaml", content)
    assert main([str(fit)]) == 0
    assert "dvae      taken over\n" in capsys.readouterr().out


def test_a_checkpoint_says_its_step_and_what_takes_room(run, capsys):
    path = checkpoint_path(run / "checkpoints", 200)
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    assert f"checkpoint {path}, " in text and ", whole\n" in text
    assert "format 1\n" in text and "after step 200\n" in text and "after 100 s of training" in text
    assert "state_dict: 3.9 KiB of tensors" in text
    assert main([str(checkpoint_path(run / "checkpoints", 1000)), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["damage"].startswith("truncated: 999 of")
    assert description["contents"] == {} and description["step"] is None


def test_a_checkpoint_of_a_later_format_is_described_all_the_same(run, monkeypatch, capsys):
    monkeypatch.setattr("tessera.training.checkpoint.FORMAT_VERSION", 2)
    path = checkpoint_path(run / "checkpoints", 300)
    AtomicCheckpointIO().save_checkpoint({"global_step": 300}, path)
    monkeypatch.undo()
    assert main([str(path)]) == 0
    assert "format 2" in capsys.readouterr().out


def test_token_shards_finished_and_not(tmp_path, capsys):
    finished = FORMATS / "shards-3"
    assert main([str(finished)]) == 0
    text = capsys.readouterr().out
    assert f"token shards {finished}, complete" in text and "  8 samples\n" in text and "codebook_size: 6" in text
    (tmp_path / "journal.json").write_text('{"complete": 64, "index": {"num_samples": 1000}}')
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "unfinished" in text and "64 of 1,000 samples" in text


def test_a_manifest_counts_what_was_seen(tmp_path, capsys):
    for name, color in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 255, 0))):
        Image.new("RGB", (16, 16), color).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "d.png").write_bytes(b"no picture")
    (tmp_path / "d.txt").write_text("d")
    ingest(tmp_path, directory=tmp_path / "manifest")
    for path in (tmp_path / "manifest", tmp_path / "manifest" / "manifest.jsonl"):
        assert main([str(path)]) == 0
        text = capsys.readouterr().out
        assert "seen 4 = kept 2 + rejected 1 + duplicate 1" in text
    assert "1 x " in text and "train: " in text
    assert main([str(tmp_path / "manifest"), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert sum(description["splits"].values()) == description["kept"] == 2
    assert sum(description["reasons"].values()) == 1


def test_a_run_that_has_just_begun(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main([str(tmp_path)]) == 0
    assert "no checkpoints" in capsys.readouterr().out


def test_a_damaged_model_is_one_line(model, capsys):
    (model / "prior" / "config.yaml").unlink()
    assert tessera_main(["info", str(model)]) == 2
    assert capsys.readouterr().err.startswith(f"tessera: {model}/prior/config.yaml is missing")


def test_anything_else_is_one_line(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "tessera.yaml").touch()
    for path, message in (
        (tmp_path, f"is no model folder (tessera.yaml), .* did you mean {tmp_path / 'inside'}"),
        (tmp_path / "absent", "absent: no such file or folder"),
        (tmp_path / "notes.txt", "is neither a checkpoint"),
    ):
        assert tessera_main(["info", str(path)]) == 2
        error = capsys.readouterr().err
        assert re.search(message.replace("(tessera.yaml)", r"\(tessera.yaml\)"), error) and error.count("\n") == 1


@pytest.mark.parametrize(
    "argv, message", [([], "required: path"), (["a", "b"], "unrecognized arguments: b"), (["a", "--yaml"], "--yaml")]
)
def test_a_wrong_command_line_is_one_line(argv, message, capsys):
    assert tessera_main(["info", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "see `tessera info --help`" in error and error.count("\n") == 1

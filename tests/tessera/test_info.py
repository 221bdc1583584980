import json

import pytest
import torch

from tessera.__main__ import main as tessera_main
from tessera.info import main
from tessera.model_folder import ModelFolder, write_part, write_sampling_defaults, write_tokenizer
from tessera.text_tokenizer import TextTokenizer

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
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for step in (200, 1000):
        (folder / "checkpoints" / f"step-{step:09d}.ckpt").touch()
    (folder / "config.yaml").write_text("config:\n  model:\n    width: 8\ninputs: {corpus: abc}\n")
    for start, rows in (("000000000", "0,3.5,100,\n0,,200,3.25\n"), ("000000200", "0,3.0,300,\n")):
        (folder / "metrics" / f"from-step-{start}").mkdir(parents=True)
        (folder / "metrics" / f"from-step-{start}" / "metrics.csv").write_text(f"epoch,loss,step,val_loss\n{rows}")
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


def test_a_run_folder_as_text_and_json(run, capsys):
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert f"run folder {run}, not finished\n" in text
    assert "checkpoints at steps 200, 1000" in text
    assert "last record at step 300" in text
    assert " loss = 3\n" in text and "val_loss = 3.25" in text and "model.width: 8" in text and "corpus: abc" in text
    assert main([str(run), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["kind"] == "run"
    assert description["checkpoints"] == [200, 1000]
    assert description["metrics"] == {"loss": 3.0, "val_loss": 3.25}
    assert description["step"] == 300 and not description["finished"]


def test_a_run_that_has_just_begun(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert main([str(tmp_path)]) == 0
    assert "no checkpoints" in capsys.readouterr().out


def test_a_damaged_model_is_one_line(model, capsys):
    (model / "prior" / "config.yaml").unlink()
    assert tessera_main(["info", str(model)]) == 2
    assert capsys.readouterr().err.startswith(f"tessera: {model}/prior/config.yaml is missing")


def test_neither_model_nor_run(tmp_path, capsys):
    assert tessera_main(["info", str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message", [([], "required: path"), (["a", "b"], "unrecognized arguments: b"), (["a", "--yaml"], "--yaml")]
)
def test_a_wrong_command_line_is_one_line(argv, message, capsys):
    assert tessera_main(["info", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "see `tessera info --help`" in error and error.count("\n") == 1

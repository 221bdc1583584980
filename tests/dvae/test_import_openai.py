"""The importer of OpenAI's files: the numbers of their modules, none of their code, one line for every mistake."""

import pickle
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dvae.import_openai import import_openai, main, read_network
from dvae.model import load
from dvae.pixels import squeeze_pixels, stretch_pixels
from dvae.reconstruct import main as reconstruct
from tessera.errors import run_command
from tessera.model_folder import ModelFolder

SIZES: dict[str, Any] = {"n_hid": 8, "n_blk_per_group": 2, "vocab_size": 32}


def published() -> Any:
    """The authors' package, which makes the files to import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is of 2021, and Python and attrs go on
        return pytest.importorskip("dall_e", reason="needs the package DALL-E")


def published_encoder(**sizes: Any) -> Any:
    return vivid(published().Encoder(**(SIZES | sizes)))


def published_decoder(**sizes: Any) -> Any:
    return vivid(published().Decoder(**({"n_init": 12} | SIZES | sizes)))


def vivid(module: Any) -> Any:
    """Weights under which every layer shows in the output: theirs start with biases of zero and a faint codebook."""
    for name, parameter in module.named_parameters():
        if name.endswith(".b"):
            nn.init.normal_(parameter, std=0.3)
    nn.init.normal_(module.blocks.input.w)
    return module


def save(path: Path, content: Any, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


class Malicious:
    """Its pickle calls os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def encoder() -> Any:
    return published_encoder()


@pytest.fixture
def decoder() -> Any:
    return published_decoder()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_imported_networks_compute_what_the_published_modules_compute(
    encoder: Any, decoder: Any, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = save(tmp_path / "e.pkl", encoder, legacy=legacy), save(tmp_path / "d.pkl", decoder, legacy=legacy)
    for name in [name for name in sys.modules if name.split(".")[0] == "dall_e"]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    vae = import_openai(*files)
    monkeypatch.undo()

    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        logits = encoder(squeeze_pixels(images))
        torch.testing.assert_close(vae.encoder(images), logits, atol=1e-5, rtol=0)
    assert torch.equal(vae.encode(images), logits.argmax(dim=1))
    codes = torch.randint(32, (2, 2, 3))
    pixels = published_pixels(decoder, codes)
    torch.testing.assert_close(vae.decode(codes), pixels, atol=1e-5, rtol=0)
    spread = min(float(logits.std(dim=(0, 2, 3)).median()), float(pixels.std(dim=(0, 2, 3)).median()))
    assert spread > 0.03, "numbers that do not vary would make this test blind"


def published_pixels(decoder: Any, codes: Tensor) -> Tensor:
    one_hot = nn.functional.one_hot(codes, decoder.vocab_size).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        return stretch_pixels(torch.sigmoid(decoder(one_hot)[:, :3])).clamp(0, 1)


def test_half_precision_becomes_full(encoder: Any, decoder: Any, tmp_path: Path) -> None:
    first, second = save(tmp_path / "e.pkl", encoder.half()), save(tmp_path / "d.pkl", decoder.half())
    assert {tensor.dtype for tensor in read_network(first, "encoder").tensors.values()} == {torch.float32}
    vae = import_openai(first, second)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    images = torch.rand(1, 3, 8, 16)
    with torch.no_grad():
        expected = encoder.float()(squeeze_pixels(images))
        torch.testing.assert_close(vae.encoder(images), expected, atol=1e-5, rtol=0)


def test_an_imported_dvae_can_be_trained_further(encoder: Any, decoder: Any, tmp_path: Path) -> None:
    vae = import_openai(save(tmp_path / "e.pkl", encoder), save(tmp_path / "d.pkl", decoder)).train()
    vae(torch.rand(1, 3, 16, 24)).output.square().mean().backward()
    for name in (
        "encoder.stem.weight",
        "encoder.vocabulary_head.weight",
        "quantizer.codebook",
        "decoder.codebook_bias",
    ):
        gradient = vae.get_parameter(name).grad
        assert gradient is not None and gradient.any(), name


def test_the_command_writes_a_model_folder_that_the_other_commands_take(
    encoder: Any, decoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(save(tmp_path / "encoder.pkl", encoder)), str(save(tmp_path / "decoder.pkl", decoder))]
    out = str(tmp_path / "model")
    assert run_command(main, ["openai", *files, "--trust-pickle", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "32 codes, 32x32 of them for 256x256 px" in printed
    assert f"tessera reconstruct {out} photo.jpg" in printed
    folder = ModelFolder.open(out)
    metadata = folder.metadata("dvae")
    assert metadata["image_size"] == [256, 256]
    assert metadata["imported"]["decoder"]["file"] == "decoder.pkl"
    assert len(metadata["imported"]["decoder"]["sha256"]) == 64
    assert (load(folder).config.widths, load(folder).config.blocks) == ((8, 16, 32, 64), (2, 2, 2, 2))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    assert reconstruct([out, str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0

    assert run_command(main, ["openai", *files, "--trust-pickle", "--out", out]) == 2
    assert "has a dvae already: choose another folder with --out" in capsys.readouterr().err


def refusal(
    encoder: Path, decoder: Path, capsys: pytest.CaptureFixture[str], *, flags: tuple[str, ...] = ("--trust-pickle",)
) -> str:
    """The one line that an import ends with."""
    out = encoder.parent / "refused"
    assert run_command(main, ["openai", str(encoder), str(decoder), *flags, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert not out.exists()
    return message


def test_without_the_flag_nothing_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(tmp_path / "e.pkl", tmp_path / "d.pkl", capsys, flags=())
    assert "pickles, which can run code" in message and "add --trust-pickle" in message


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_that_calls_anything_is_refused_by_name_and_runs_nothing(
    legacy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    malicious = Malicious(tmp_path / "marker")
    message = refusal(save(tmp_path / "e.pkl", malicious, legacy=legacy), tmp_path / "d.pkl", capsys)
    assert ".system, which no file of OpenAI's dVAE does" in message and "nothing in it was run" in message
    assert not malicious.marker.exists()
    pickle.loads(pickle.dumps(malicious))
    assert malicious.marker.exists(), "a pickle that harms nobody would make this test blind"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_call_hidden_in_a_published_network_is_found(
    legacy: bool, encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder.blocks.group_1.note = Malicious(tmp_path / "marker")
    first = save(tmp_path / "e.pkl", encoder, legacy=legacy)
    assert ".system, which no file of OpenAI's dVAE does" in refusal(first, tmp_path / "d.pkl", capsys)
    assert not (tmp_path / "marker").exists()


def test_a_bare_pickle_is_refused_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(Malicious(tmp_path / "marker")))
    assert "e.pkl names " in refusal(tmp_path / "e.pkl", tmp_path / "d.pkl", capsys)
    assert not (tmp_path / "marker").exists()


def test_a_file_that_is_absent_is_named(encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = save(tmp_path / "e.pkl", encoder)
    assert "d.pkl: no such file; expected decoder.pkl" in refusal(first, tmp_path / "d.pkl", capsys)


def test_swapped_files_are_told_apart(
    encoder: Any, decoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = save(tmp_path / "e.pkl", encoder), save(tmp_path / "d.pkl", decoder)
    assert "d.pkl holds the decoder, expected the encoder" in refusal(second, first, capsys)
    assert "e.pkl holds the encoder, expected the decoder" in refusal(first, first, capsys)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 40}, "32 codes in the encoder, 40 in the decoder"),
        ({"n_hid": 12}, "(8, 16, 32, 64) widths in the encoder, (12, 24, 48, 96) in the decoder"),
        ({"n_blk_per_group": 1}, "(2, 2, 2, 2) blocks in the encoder, (1, 1, 1, 1) in the decoder"),
        ({"output_channels": 1}, "expected shape (6,) for decoder.pixel_head.bias, found (2,)"),
    ],
)
def test_networks_that_do_not_belong_together_are_refused(
    sizes: dict[str, int], message: str, encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = save(tmp_path / "e.pkl", encoder), save(tmp_path / "d.pkl", published_decoder(**sizes))
    assert message in refusal(first, second, capsys)


def test_a_network_with_other_layers_is_refused(
    encoder: Any, decoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder.blocks.group_2.block_1.extra = published().encoder.Conv2d(8, 8, 1)
    first, second = save(tmp_path / "e.pkl", encoder), save(tmp_path / "d.pkl", decoder)
    message = "expected shape none for encoder.blocks.group_2.block_1.extra.bias, found (8,)"
    assert message in refusal(first, second, capsys)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated_files_are_refused(
    legacy: bool, encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = save(tmp_path / "whole.pkl", encoder, legacy=legacy).read_bytes()
    for share in (0.05, 0.5, 0.999):
        (tmp_path / "e.pkl").write_bytes(content[: int(share * len(content))])
        message = refusal(tmp_path / "e.pkl", tmp_path / "d.pkl", capsys)
        assert "e.pkl is damaged or not a published dVAE" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>Not found</html>", pickle.dumps({"weight": 1}), bytes(range(256)) * 4],
    ids=["empty", "page", "pickle", "noise"],
)
def test_other_files_are_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.pkl").write_bytes(content)
    message = refusal(tmp_path / "e.pkl", tmp_path / "d.pkl", capsys)
    assert "expected encoder.pkl as OpenAI published it" in message


@pytest.mark.parametrize(
    "content", [OrderedDict(a=torch.ones(2)), torch.ones(2), nn.Sequential(nn.ReLU())], ids=["dict", "tensor", "module"]
)
def test_pytorch_files_of_other_things_are_refused(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = save(tmp_path / "e.pkl", content)
    assert "expected encoder.pkl as OpenAI published it" in refusal(first, tmp_path / "d.pkl", capsys)

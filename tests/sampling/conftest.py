"""A tiny model folder with random weights: everything that the commands need, and nothing learned."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from sampling.pipeline import Pipeline
from scorer.model import ClipScorer, ClipScorerConfig
from tessera.config import to_plain
from tessera.model_folder import write_part, write_sampling_defaults, write_tokenizer
from tessera.text_tokenizer import TextTokenizer
from transformer.model import Prior, PriorConfig, SequenceLayout

CAPTIONS = ["a red star", "a blue ring left of a green cross", "two small yellow circles on black"]


def write_random_model(
    folder: Path, *, with_scorer: bool = True, scorer_image_size: tuple[int, int] = (16, 24)
) -> Path:
    """Write a model for 16x24 pixel images: 4x6 codes of a codebook of 15."""
    tokenizer = TextTokenizer.train(CAPTIONS, vocab_size=300)
    vae = DiscreteVAE(DiscreteVAEConfig(levels=(5, 3), patch_size=4, widths=(8,), blocks=(1,)))
    layout = SequenceLayout(
        text_len=8,
        grid_height=4,
        grid_width=6,
        text_vocab_size=tokenizer.vocab_size,
        codebook_size=vae.codebook_size,
    )
    prior = Prior(PriorConfig(layout=layout, dim=16, depth=2, heads=2, attention=("row", "full")))
    randomize(prior)
    write_tokenizer(folder, tokenizer.proto)
    vae_hash = write_part(folder, "dvae", config=to_plain(vae.config), tensors=vae.state_dict())
    requires = {"tokenizer": tokenizer.sha256, "dvae": vae_hash}
    write_part(folder, "prior", config=to_plain(prior.config), tensors=prior.state_dict(), requires=requires)
    write_sampling_defaults(folder, {"temperature": 0.9, "guidance": 2.0})
    if with_scorer:
        config = ClipScorerConfig(
            image_size=scorer_image_size,
            text_len=8,
            text_vocab_size=tokenizer.vocab_size,
            stem_width=8,
            dim=16,
            heads=2,
            image_layers=1,
            text_layers=1,
            matcher_layers=1,
            embedding_dim=8,
        )
        clip = ClipScorer(config)
        randomize(clip)
        requires = {"tokenizer": tokenizer.sha256}
        write_part(folder, "scorer", config=to_plain(config), tensors=clip.state_dict(), requires=requires)
    return folder


def randomize(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model_without_scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "plain", with_scorer=False)


@pytest.fixture(scope="session")
def model_with_another_scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its scorer was trained on 32x32 pixels."""
    return write_random_model(tmp_path_factory.mktemp("models") / "unlike", scorer_image_size=(32, 32))


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> Pipeline:
    return Pipeline.load(model_folder, device="cpu", precision="fp32")

"""A tiny model folder with random weights: everything that the commands need, and nothing learned."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from sampling.pipeline import Pipeline
from scorer.model import ClipScorer, ClipScorerConfig
from tessera.config import to_plain
from tessera.model_folder import write_part, write_sampling_defaults, write_tokenizer
from tessera.text_tokenizer import TextTokenizer
from transformer.cache import KVCache
from transformer.model import Prior, PriorConfig, SequenceLayout

CAPTIONS = ["a red star", "a blue ring left of a green cross", "two small yellow circles on black"]


def write_random_model(
    folder: Path,
    *,
    with_scorer: bool = True,
    scorer_image_size: tuple[int, int] = (16, 24),
    condition_dropout: float = 0.1,
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
    write_part(
        folder,
        "prior",
        config=to_plain(prior.config),
        tensors=prior.state_dict(),
        requires=requires,
        metadata={"condition_dropout": condition_dropout},
    )
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


@pytest.fixture(scope="session")
def model_without_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its prior never saw an empty caption."""
    folder = tmp_path_factory.mktemp("models") / "certain"
    return write_random_model(folder, with_scorer=False, condition_dropout=0.0)


@pytest.fixture
def small(pipeline: Pipeline) -> Pipeline:
    """The same model with room for four rows: two images with guidance, four without."""
    copy = Pipeline(
        prior=pipeline.prior,
        vae=pipeline.vae,
        tokenizer=pipeline.tokenizer,
        scorer=pipeline.scorer,
        settings=pipeline.settings,
        model_sha256=pipeline.model_sha256,
    )
    copy.max_rows = 4
    return copy


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A picture of the size that the tiny model draws."""
    generator = np.random.default_rng(1)
    return Image.fromarray(generator.integers(0, 256, (16, 24, 3), dtype=np.uint8))


class DecodeCalls(list[int]):
    """The numbers of rows of the forwards of a decoder, one for each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline, on_call: Callable[[int], None]) -> None:
        super().__init__()
        decode = pipeline.decoder.decode

        def counted(codes: Tensor, position: int | Tensor, cache: KVCache) -> Tensor:
            self.append(len(codes))
            on_call(len(self))
            return decode(codes, position, cache)

        monkeypatch.setattr(pipeline.decoder, "decode", counted)


@pytest.fixture
def count_decode_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., DecodeCalls]:
    """Spy on a pipeline's decoder; the second argument, if given, is called with the number of each call."""

    def spy(pipeline: Pipeline, on_call: Callable[[int], None] = lambda number: None) -> DecodeCalls:
        monkeypatch.setattr(pipeline, "speculate", False)  # one call for each position
        return DecodeCalls(monkeypatch, pipeline, on_call)

    return spy

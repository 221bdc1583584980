"""A tiny model of the scenes with random weights, a folder of captioned images, and settings that train in seconds."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from scorer.model import ClipScorer, ClipScorerConfig
from tessera.config import to_plain
from tessera.data.scenes import render, sample_scene, scene_captions
from tessera.model_folder import write_part, write_sampling_defaults, write_tokenizer
from tessera.text_tokenizer import TextTokenizer
from transformer.model import Prior, PriorConfig, SequenceLayout

TINY = (
    "dvae.model.widths=[8,16]",
    "dvae.model.blocks=[1,1]",
    "prior.model.dim=16",
    "prior.model.depth=1",
    "prior.model.heads=2",
    "scorer.model.dim=16",
    "scorer.model.stem_width=8",
    "scorer.model.heads=2",
    "scorer.model.image_layers=1",
    "scorer.model.text_layers=1",
    "dvae.trainer.max_steps=3",
    "prior.trainer.max_steps=3",
    "scorer.trainer.max_steps=2",
)


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Overrides that shrink every model and stage."""
    return TINY


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(24):
        _, scene = sample_scene(1, index)
        Image.fromarray(render(scene, (32, 32))).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(scene_captions(1, index)[0])
    return folder


@pytest.fixture(scope="session")
def scenes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reads captions of scenes and draws 16x16 pixels of noise."""
    folder = tmp_path_factory.mktemp("models") / "my-model"
    torch.manual_seed(0)
    captions = [caption for index in range(40) for caption in scene_captions(0, index)]
    tokenizer = TextTokenizer.train(captions, vocab_size=400)
    vae = DiscreteVAE(DiscreteVAEConfig(levels=(5, 3), patch_size=4, widths=(8, 8), blocks=(1, 1)))
    layout = SequenceLayout(
        text_len=24,
        grid_height=2,
        grid_width=2,
        text_vocab_size=tokenizer.vocab_size,
        codebook_size=vae.codebook_size,
    )
    prior = Prior(PriorConfig(layout=layout, dim=16, depth=1, heads=2))
    clip = ClipScorer(
        ClipScorerConfig(
            image_size=(16, 16),
            text_len=24,
            text_vocab_size=tokenizer.vocab_size,
            stem_width=8,
            dim=16,
            heads=2,
            image_layers=1,
            text_layers=1,
            matcher_layers=1,
            embedding_dim=8,
        )
    )
    write_tokenizer(folder, tokenizer.proto)
    for name, model, requires in (
        ("dvae", vae, {}),
        ("prior", prior, {"tokenizer": tokenizer.sha256}),
        ("scorer", clip, {"tokenizer": tokenizer.sha256}),
    ):
        write_part(folder, name, config=to_plain(model.config), tensors=model.state_dict(), requires=requires)
    write_sampling_defaults(folder, {"temperature": 1.0, "guidance": 2.0})
    return folder

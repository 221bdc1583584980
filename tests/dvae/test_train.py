"""Training the dVAE as a command: crops, pictures, logged terms, finished runs, errors."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dvae.adversarial import AdversarialConfig
from dvae.losses import LossConfig
from dvae.model import DiscreteVAEConfig
from dvae.train import ImageBatches, TrainConfig, train
from tessera.data.config import DataConfig
from tessera.data.images import open_image
from tessera.data.order import sample_keys
from tessera.errors import UserError
from tessera.model_folder import ModelFolder
from tessera.training.metrics import read_metrics
from tessera.training.run import TrainerConfig

DATA = DataConfig(path="scenes", image_size=(16, 24), limit=40)


def tiny(tmp_path: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        data=DATA,
        model=DiscreteVAEConfig(widths=(8, 16), blocks=(0, 1), levels=(4, 4)),
        trainer=TrainerConfig(max_steps=6, batch_size=4, device="cpu", precision="fp32", validate_every_steps=3),
        out=str(tmp_path / "model"),
        run_dir=str(tmp_path / "run"),
    )
    return replace(config, **changes)


def test_crops_prefer_the_eventful_part_of_a_picture() -> None:
    images = np.zeros((1, 32, 32, 3), np.uint8)
    images[0, 20:28, 20:28] = 255
    source = ImageBatches(images, crop=16, crop_candidates=40)
    batch = source.batch(sample_keys(0, 16, size=1, seed=0))["images"]
    assert batch.shape == (16, 16, 16, 3)
    assert (batch.float().amax(dim=(1, 2, 3)) == 255).all()


def test_other_processes_map_the_pictures_themselves(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    source = ImageBatches(np.load(tmp_path / "images.npy", mmap_mode="r"), flip=True)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    keys = sample_keys(0, 8, size=8, seed=1)
    assert torch.equal(pickle.loads(sent).batch(keys)["images"], source.batch(keys)["images"])


def test_a_batch_depends_on_its_keys_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    source = ImageBatches(images, flip=True, crop=8)
    keys = sample_keys(0, 6, size=8, seed=1)
    whole = source.batch(keys)["images"]
    for place, key in enumerate(keys):
        assert (source.batch([key])["images"][0] == whole[place]).all()
    flipped = ImageBatches(images, flip=True).batch(keys)["images"].numpy()
    for place, key in enumerate(keys):
        expected = images[key.index][:, ::-1] if key.seed & 1 else images[key.index]
        assert (flipped[place] == expected).all()


def test_it_trains_exports_and_remembers(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    result = train(config)
    assert result["steps"] == 6
    assert set(result["metrics"]) == {"psnr", "ssim", "codebook_usage", "perplexity", "dead_codes"}
    folder = ModelFolder.open(tmp_path / "model", parts=["dvae"])
    assert folder.part_sha256("dvae") == result["sha256"]
    assert train(config) == result, "a finished run is not run again"
    with pytest.raises(UserError, match=r"config.trainer.max_steps was 6 and is now 7"):
        train(tiny(tmp_path, trainer=TrainerConfig(max_steps=7, batch_size=4, device="cpu", precision="fp32")))


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="divisible by 8 .*; got 20x24"):
        train(tiny(tmp_path, data=DataConfig(image_size=(20, 24))))
    with pytest.raises(UserError, match="crop must be a multiple of 8 of at most 16 pixels; got 24"):
        train(tiny(tmp_path, crop=24))


def test_training_draws_what_it_has_learned(tmp_path: Path) -> None:
    train(tiny(tmp_path))
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert pictures == ["codebook.png", "reconstructions-000000003.png", "reconstructions-000000006.png"]
    assert open_image(tmp_path / "run" / "pictures" / "codebook.png").width > 100


def test_every_term_is_logged_by_its_name(tmp_path: Path) -> None:
    config = tiny(
        tmp_path,
        model=DiscreteVAEConfig(widths=(8, 16), blocks=(0, 1), quantizer="gumbel", codebook_size=16),
        loss=LossConfig(l1=0.5, l2=2.0, ssim=0.1),
        adversarial=AdversarialConfig(weight=0.1, width=4, layers=2, start=0.0, ramp=0.5),
        trainer=TrainerConfig(
            max_steps=4, batch_size=4, device="cpu", precision="fp32", validate_every_steps=4, log_every_steps=1
        ),
    )
    train(config)
    logged = read_metrics(tmp_path / "run")
    names = {"l1", "l2", "ssim", "kl", "generator", "discriminator", "lecam", "kl_weight", "temperature"}
    assert names | {"loss", "psnr", "usage", "perplexity", "dead_codes", "val_psnr", "val_ssim"} <= set(logged)
    assert [step for step, _ in logged["l2"]] == [0, 1, 2, 3]


def test_losses_that_do_not_fit_the_decoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.pixels=logit_laplace"):
        train(tiny(tmp_path, loss=LossConfig(logit_laplace=1.0)))
    assert not (tmp_path / "run").exists(), "refused before anything is made"

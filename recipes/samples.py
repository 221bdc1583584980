"""What a prior draws while it trains, for captions that it does not train on, beside the nearest training pictures.

The same captions and random numbers every time, so that the sheets of a run show one thing: training. Drawing takes a
small share of the time of training, and changes nothing else about it.
"""

import logging
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dvae.model import DiscreteVAE
from dvae.model import load as load_vae
from dvae.reconstruct import decode_grids, images_per_forward
from dvae.train import PICTURES_DIR
from recipes.memorization import Pair, Thumbnails, nearest_sheet
from recipes.tune import DEFAULT_SETTINGS
from sampling.decode import sample_codes
from sampling.settings import SamplingSettings
from tessera.data.images import save_png
from tessera.data.order import permuted
from tessera.data.shards import TokenShards, batches
from tessera.model_folder import ModelFolder
from tessera.precision import Precision, resolve_precision
from tessera.text_tokenizer import TextTokenizer
from transformer.decoder import Decoder
from transformer.model import Prior
from transformer.train import TrainConfig, split_rows

# n samples, N training pictures, I image tokens, h w code grid, H W pixels.

_PROMPTS = 8
_SHARE_OF_TIME = 0.04
_READ_AT_ONCE = 128  # training pictures, between two looks at the clock

_logger = logging.getLogger(__name__)


class _Drawn(NamedTuple):
    """The first captions and what was drawn for them."""

    captions: list[str]
    images: NDArray[np.uint8]  # [n, H, W, 3]


class SamplePainter:
    """Draws with the prior that it is given, where and when it is called; saves a sheet and returns it.

    The first drawing takes place whatever it takes. From then on there is one when the earlier ones are less than 4% of
    the time since this was made, with as many of the captions as fit. Training pictures are decoded in what is left of
    that time, in random order: the nearest is the nearest of those decoded so far, after a while of all.

    Errors are logged: no picture is worth a run.

    Args:
        config: of the training; names the shards and the model folder whose dVAE decodes.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._began = time.monotonic()
        self._spent = 0.0
        self._studio: _Studio | None = None

    def __call__(self, step: int, prior: Prior) -> NDArray[np.uint8] | None:
        """Paints.

        Args:
            step: of the training.
            prior: on any device; neither its weights nor its mode change.

        Returns:
            The sheet, uint8 [height, width, 3], which is in run_dir/pictures, too; None where nothing was drawn.
        """
        began = time.monotonic()
        seconds = _SHARE_OF_TIME * (began - self._began) - self._spent
        if seconds <= 0 and self._studio is not None:
            return None
        device = prior.text_embedding.weight.device
        try:
            with (
                torch.inference_mode(),
                torch.autocast(device.type, enabled=False),  # validation runs in training's
                torch.random.fork_rng([device] if device.type == "cuda" else []),
            ):
                if self._studio is None:
                    self._studio = _Studio(self.config, device)
                return self._studio.paint(step, prior, deadline=began + seconds)
        except Exception as error:
            _logger.warning("no samples were drawn at step %d: %s: %s", step, type(error).__name__, error)
            return None
        finally:
            self._spent += time.monotonic() - began


class _Studio:
    """What all drawings of a run share: captions, the dVAE, and the training pictures decoded so far."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        folder = ModelFolder.open(config.out, parts=["dvae"])
        self.vae: DiscreteVAE = load_vae(folder, device=device)
        self.precision: Precision = resolve_precision(config.trainer.precision, device)
        self.directory = Path(config.run_dir) / PICTURES_DIR
        self.shards = TokenShards(Path(config.shards))
        train_rows, validation_rows = split_rows(len(self.shards), config.validation_share)
        self.captions = _captions(self.shards, validation_rows if len(validation_rows) else train_rows)
        self.text_ids = TextTokenizer(folder.tokenizer_proto()).encode_batch(
            self.captions, text_len=self.shards.index.text_len
        )
        settings = DEFAULT_SETTINGS if config.condition_dropout else {**DEFAULT_SETTINGS, "guidance": 1.0}
        self.settings = SamplingSettings(**settings)  # type: ignore[arg-type]
        self.rows = train_rows[permuted(np.arange(len(train_rows)), size=len(train_rows), key=0)]
        self.thumbnails = Thumbnails()  # of the first of these rows

    def paint(self, step: int, prior: Prior, *, deadline: float) -> NDArray[np.uint8]:
        """Draws, looks up and saves; ends soon after `deadline`, of `time.monotonic`, with at least one sample."""
        captions, images = self._draw(prior, deadline)
        self._decode_more(deadline)
        found = self.thumbnails.nearest(images)
        rows = self.rows[found.index]
        pairs = [
            Pair(image, caption, neighbor, self.shards.captions(int(row))[0], float(ratio))
            for image, caption, neighbor, row, ratio in zip(
                images, captions, self._pictures(rows), rows, found.ratio, strict=True
            )
        ]
        title = f"step {step:,}: samples, each beside the nearest of {len(self.thumbnails):,} training pictures"
        sheet = nearest_sheet(pairs, title=title)
        save_png(self.directory / f"samples-{step:09d}.png", sheet, {})
        return sheet

    def _draw(self, prior: Prior, deadline: float) -> _Drawn:
        decoder = Decoder(prior, weights=self.precision.name)
        began = time.monotonic()
        parts = [self._sample(decoder, range(1))]
        now = time.monotonic()
        # together they take less than one after the other, so that there will be time to look some up
        more = max(0, int((deadline - now) / max(now - began, 1e-3)))
        if rest := range(1, min(len(self.captions), 1 + more)):
            parts.append(self._sample(decoder, rest))
        images = np.concatenate(parts)
        return _Drawn(self.captions[: len(images)], images)

    def _sample(self, decoder: Decoder, places: range) -> NDArray[np.uint8]:
        """Images uint8 [n, H, W, 3] for some of the captions."""
        seeds = torch.tensor(places)
        sampled = sample_codes(
            decoder,
            self.text_ids[places.start : places.stop],
            settings=self.settings,
            seeds=seeds,
            image_index=torch.zeros_like(seeds),
        )
        return self._decoded(sampled.codes.cpu().numpy())

    def _decode_more(self, deadline: float) -> None:
        """Takes further training pictures into the comparison, at first some in any case."""
        left = self.rows[len(self.thumbnails) :]
        at_once = min(_READ_AT_ONCE, images_per_forward(self.vae.config, *self._image_size))
        for span in batches(len(left), at_once):
            if len(self.thumbnails) and time.monotonic() >= deadline:
                return
            self.thumbnails.add(self._pictures(left[span.start : span.stop]))

    def _pictures(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Training pictures as the dVAE has them, uint8 [n, H, W, 3]."""
        return self._decoded(self.shards.codes[rows, 0])

    def _decoded(self, codes: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Images uint8 [n, H, W, 3] of codes [n, I]."""
        index = self.shards.index
        grids = codes.reshape(-1, index.grid_height, index.grid_width)  # [n, h, w]
        return decode_grids(self.vae, grids, precision=self.precision)

    @property
    def _image_size(self) -> tuple[int, int]:
        return self.shards.index.image_height, self.shards.index.image_width


def prior_painter(config: TrainConfig) -> SamplePainter:
    """What `transformer.train.train` takes as `show`, to have samples drawn at each validation."""
    return SamplePainter(config)


def _captions(shards: TokenShards, rows: NDArray[np.int64]) -> list[str]:
    """The first captions of some samples far apart, those that say something and differ."""
    spread = rows[np.linspace(0, len(rows) - 1, num=min(len(rows), 4 * _PROMPTS)).astype(np.int64)]
    captions = dict.fromkeys(shards.captions(int(row))[0] for row in spread)
    return [caption for caption in captions if caption][:_PROMPTS] or [""]

"""What going on from a model is worth on few new pictures: at what learning rate, and for how many passes over them.

python -m benchmarks.finetuning MODEL [--pictures N] [--prompts N] [--quick] [--out benchmarks/results/finetuning.json]

MODEL is a model folder trained on scenes (`tessera fit scenes`). The new pictures are scenes whose red and blue are
exchanged, so that nearly every color word has come to mean another color. All priors learn the same codes of MODEL's
frozen dVAE; a quarter of the pictures is held out. The parser reads what a prior draws after red and blue are exchanged
once more.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.record import Row, write_results
from dvae.encode import encode
from recipes.continuing import CONTINUED_RATE, MOST_CONTINUED_EPOCHS
from recipes.origin import Base, open_base, take_over
from recipes.plan import Plan, draft
from recipes.plan_sizes import DataFacts
from recipes.speed import measure_machine
from sampling.pipeline import Pipeline
from tessera.data.config import DataConfig
from tessera.data.scenes import render, sample_prompts, sample_scene, scene_captions
from tessera.data.scenes_parser import satisfies
from tessera.data.shards import TokenShards
from tessera.errors import UserError, run_command
from tessera.model_folder import ModelFolder
from tessera.training.metrics import read_metrics
from transformer.lit import prior_loss
from transformer.model import load as load_prior
from transformer.train import split_rows, train, validation_batches

CLAIM = "a prior that goes on from a model, at shares of the rate and numbers of epochs, against one with new weights"
SEED = 909
HELD_OUT_SHARE = 0.25
_VALIDATIONS = 10
_IMAGES_PER_PROMPT = 4
_UNIT = "nats per held-out image token"
_DRAWING = {"temperature": 0.75, "guidance": 1.5}


class Contestant(NamedTuple):
    """A way to a prior for the new pictures."""

    rate: float
    """As a share of the rate for new weights."""
    epochs: int
    """Passes over the pictures that are not held out; 0 trains nothing."""
    is_continued: bool = True

    @property
    def name(self) -> str:
        """For people."""
        if not self.epochs:
            return "as it was"
        start = f"gone on from at {self.rate:g} of the rate" if self.is_continued else "new weights"
        return f"{start}, {self.epochs} epochs"


AS_IT_WAS = Contestant(0.0, 0)
CHOSEN = Contestant(CONTINUED_RATE, MOST_CONTINUED_EPOCHS)
NEW = Contestant(1.0, MOST_CONTINUED_EPOCHS, is_continued=False)
CONTESTANTS = (
    AS_IT_WAS,
    *(Contestant(rate, MOST_CONTINUED_EPOCHS) for rate in (1.0, CONTINUED_RATE, 0.1)),
    *(Contestant(CONTINUED_RATE, epochs) for epochs in (5, 10, 20, 80)),
    NEW,
    NEW._replace(epochs=80),
)


def recolored_scenes(folder: Path, *, pictures: int, image_size: tuple[int, int]) -> None:
    """Writes scenes with red and blue exchanged, with all their captions, as files."""
    folder.mkdir()
    for index in range(pictures):
        _, scene = sample_scene(SEED, index, image_size=image_size)
        swapped = np.ascontiguousarray(render(scene, image_size)[..., ::-1])
        Image.fromarray(swapped).save(folder / f"{index:05d}.png")
        captions = scene_captions(SEED, index, image_size=image_size)
        (folder / f"{index:05d}.txt").write_text("\n".join(captions))


def planned(base: Base, data: DataConfig, *, pictures: int) -> Plan:
    """What `tessera fit --from` would do with these pictures."""
    facts = DataFacts(
        name="recolored", num_images=pictures, image_size=base.image_size, text_len=base.prior.layout.text_len
    )
    return draft(data, facts, measure_machine(), minutes=10.0, device="auto", seed=0, base=base)


def trained(contestant: Contestant, plan: Plan, shards: TokenShards, out: Path) -> list[tuple[float, float]]:
    """Makes a model folder with the contestant's prior, and returns its held-out losses on the way by step."""
    assert plan.origin is not None
    take_over(plan.origin, out)
    rate = plan.prior.optim.learning_rate / CONTINUED_RATE
    samples, _ = split_rows(len(shards), HELD_OUT_SHARE)
    steps = max(1, contestant.epochs * len(samples) // plan.prior.trainer.batch_size)
    every = max(1, steps // _VALIDATIONS)
    trainer = replace(plan.prior.trainer, max_steps=steps, validate_every_steps=every, compile=False)
    config = replace(
        plan.prior,
        shards=str(shards.directory),
        out=str(out),
        run_dir=f"{out}.run",
        init_from=plan.origin.path if contestant.is_continued else None,
        optim=replace(plan.prior.optim, learning_rate=contestant.rate * rate),
        trainer=trainer,
        validation_share=HELD_OUT_SHARE,
    )
    train(config)
    return read_metrics(Path(config.run_dir)).get("val_image_loss", [])


def held_out_loss(model: Path, shards: TokenShards) -> float:
    """Mean nats per image token on the held-out pictures."""
    folder = ModelFolder.open(model, parts=["prior"])
    prior = load_prior(folder)
    _, rows = split_rows(len(shards), HELD_OUT_SHARE)
    losses = []
    with torch.inference_mode():
        for batch in validation_batches(shards, rows, open_base(model).tokenizer):
            output = prior(batch["text_ids"], batch["codes"])
            codes, text_vocab_size = batch["codes"], prior.layout.text_vocab_size
            loss = prior_loss(output, batch["text_ids"], codes, text_vocab_size=text_vocab_size)
            losses += [float(loss.image)] * len(codes)
    return statistics.mean(losses)


def share_right(model: Path, *, prompts: int) -> float:
    """Share of drawn pictures that show what their prompt says, with the new meaning of the colors."""
    asked = sample_prompts(prompts, seed=SEED)
    images = Pipeline.load(model)(
        [prompt.text for prompt in asked], n=_IMAGES_PER_PROMPT, seed=SEED, scorer=None, **_DRAWING
    )
    specs = [prompt.spec for prompt in asked for _ in range(_IMAGES_PER_PROMPT)]
    return statistics.mean(
        satisfies(np.ascontiguousarray(image.image[..., ::-1]), spec) for image, spec in zip(images, specs, strict=True)
    )


def main(argv: Sequence[str]) -> int:
    """Trains the contestants and writes one row for the loss and two for the pictures of each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetuning", description=CLAIM)
    parser.add_argument("model", nargs="?", help="a model folder trained on scenes")
    parser.add_argument("--pictures", type=int, default=300, help="new pictures (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=200, help="to draw for, 4 pictures each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="60 pictures, 12 prompts")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetuning.json"))
    arguments = parser.parse_args(argv)
    if arguments.model is None:
        print("nothing measured: name a model folder trained on scenes, as `tessera fit scenes --out MODEL` makes it")
        return 0
    pictures, prompts = (60, 12) if arguments.quick else (arguments.pictures, arguments.prompts)
    base = open_base(arguments.model)
    if ModelFolder.open(base.origin.path).metadata("prior").get("corpus") != "scenes":
        raise UserError(f"{arguments.model} was not trained on scenes, whose captions and pictures are needed here")
    losses: dict[str, float] = {}
    right: dict[str, float] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recolored_scenes(folder / "pictures", pictures=pictures, image_size=base.image_size)
        data = DataConfig(path=str(folder / "pictures"), image_size=base.image_size, cache_dir=str(folder / "data"))
        plan = planned(base, data, pictures=pictures)
        take_over(base.origin, folder / "frozen")
        encode(replace(plan.encode, data=data, out=str(folder / "frozen"), shards=str(folder / "shards")))
        shards = TokenShards(folder / "shards")
        for place, contestant in enumerate(CONTESTANTS):
            model = Path(base.origin.path)
            if contestant.epochs:
                model = folder / f"model-{place}"
                curves[contestant.name] = trained(contestant, plan, shards, model)
            losses[contestant.name] = held_out_loss(model, shards)
            right[contestant.name] = share_right(model, prompts=prompts)
            print(f"{contestant.name}: {losses[contestant.name]:.3f} nats, {right[contestant.name]:.1%} right")
    rows = []
    for contestant in CONTESTANTS:
        name = contestant.name
        rows.append(Row(f"{name}: loss", losses[name], _UNIT, "", None, None))
        for peer in (NEW.name, AS_IT_WAS.name):
            if peer != name:
                goal = 1.0 if contestant == CHOSEN else None  # what `tessera fit --from` does
                # half a picture, so that none at all is no division by zero
                ratio = right[name] / max(right[peer], 0.5 / (prompts * _IMAGES_PER_PROMPT))
                rows.append(Row(f"{name}: right", right[name], "share of pictures", peer, ratio, goal))
    raw = {
        "model": base.origin.sha256,
        "pictures": pictures,
        "held_out_share": HELD_OUT_SHARE,
        "prompts": prompts,
        "held_out_loss_by_step": curves,
        "rate_for_new_weights": plan.prior.optim.learning_rate / CONTINUED_RATE,
        **_DRAWING,
    }
    write_results(arguments.out, claim=CLAIM, rows=rows, raw=raw)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, sys.argv[1:]))

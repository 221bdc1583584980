"""The DALLE of dalle-pytorch 1.6.6, a peer of benchmarks/sampling.py, in an environment of its own.

    dalle_pytorch_prior.py JOB.json     answers numbers n on standard input with the seconds that n calls took
    dalle_pytorch_prior.py --check      does the package work here, and is the repaired cache right?

It imports nothing of Tessera; benchmarks/peers/tessera_prior.py says what a worker prints and when.
"""

import json
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# B images, T text tokens, I image tokens.

_WARM_UP_CODES = 4
_SHAPE = {"text_len": 4, "grid": 4, "text_ids": 20, "codes": 16, "dim": 64, "depth": 2, "heads": 1}


def dalle_pytorch() -> Any:
    """The package, behind two lines that stand in for a module that its dependency's dependency has lost."""
    lost = types.ModuleType("pytorch_lightning.utilities.distributed")
    lost.rank_zero_only = lambda function: function  # type: ignore[attr-defined]
    sys.modules[lost.__name__] = lost
    import dalle_pytorch  # type: ignore[import-not-found]

    return dalle_pytorch


def with_repaired_cache(shipped: Any) -> Any:
    """The class DALLE with a cache that reaches the model when nothing guides."""

    class Repaired(shipped):
        def forward_with_cond_scale(self, *args: Any, cond_scale: float = 1, cache: Any = None, **kwargs: Any) -> Any:
            # the shipped method calls self(*args, **kwargs) here and so drops the cache: every step begins anew
            if cond_scale == 1:
                return self.forward(*args, cache=cache, **kwargs)
            return super().forward_with_cond_scale(*args, cond_scale=cond_scale, cache=cache, **kwargs)

    return Repaired


def build(package: Any, shape: dict[str, int], *, repaired: bool) -> Any:
    """A DALLE with random weights, token shift and rotary positions on as they are by default; 4 pixels per code."""
    torch.manual_seed(0)
    vae = package.DiscreteVAE(
        image_size=4 * shape["grid"],
        num_layers=2,
        num_tokens=shape["codes"],
        codebook_dim=256,
        hidden_dim=64,
        num_resnet_blocks=1,
    )
    dalle_class = with_repaired_cache(package.DALLE) if repaired else package.DALLE
    return dalle_class(
        dim=shape["dim"],
        vae=vae,
        num_text_tokens=shape["text_ids"],
        text_seq_len=shape["text_len"],
        depth=shape["depth"],
        heads=shape["heads"],
        dim_head=shape["dim"] // shape["heads"],
    )


def random_text(shape: dict[str, int], batch: int) -> Tensor:
    """Ids int64 [B, T] without padding, which is 0."""
    return torch.randint(1, shape["text_ids"], (batch, shape["text_len"]))


def generation(dalle: Any, job: dict[str, Any]) -> Callable[[], Tensor]:
    """All codes of a batch, from text ids.

    The package's own loop, which ends with pixels: its tokenizer hands the codes back instead, and is timed apart.
    """
    shape = job["shape"]
    text = random_text(shape, job["batch"])
    dalle.vae.decode = lambda codes: codes

    def generate(**more: Any) -> Tensor:
        return dalle.generate_images(
            text.clone(),  # guidance writes zeros into it
            filter_thres=0.9,
            temperature=1.0,
            cond_scale=job["guidance"],
            use_cache=job["repaired"],
            **more,
        )

    # the warm-up: without a cache a whole picture takes too long for that, the last codes of a given one do not
    given = torch.rand(job["batch"], 3, 4 * shape["grid"], 4 * shape["grid"])
    generate(img=given, num_init_img_tokens=shape["grid"] ** 2 - _WARM_UP_CODES)
    return generate


def pixels(dalle: Any, job: dict[str, Any]) -> Callable[[], Tensor]:
    """Pictures of given codes."""
    vae = dalle.vae.eval()
    codes = torch.randint(job["shape"]["codes"], (job["batch"], job["shape"]["grid"] ** 2))

    def decode() -> Tensor:
        with torch.no_grad():
            return vae.decode(codes)

    return decode


def training(dalle: Any, job: dict[str, Any]) -> Callable[[], None]:
    """Forward and backward pass and a step of Adam for all parameters but the tokenizer's."""
    shape = job["shape"]
    text = random_text(shape, job["batch"])
    codes = torch.randint(shape["codes"], (job["batch"], shape["grid"] ** 2))  # [B, I]
    learned = [parameter for parameter in dalle.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=1e-3)
    dalle.train()

    def step() -> None:
        is_bf16 = job["precision"] == "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16) if is_bf16 else nullcontext():
            loss = dalle(text, codes, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def slices(job: dict[str, Any]) -> None:
    """Answers the lines of standard input."""
    torch.set_num_threads(job["threads"])
    package = dalle_pytorch()
    print(f"dalle-pytorch {version('dalle-pytorch')}, torch {torch.__version__}", flush=True)
    sys.stdin.readline()
    dalle = build(package, job["shape"], repaired=job["repaired"])
    call = {"generate": generation, "pixels": pixels, "train": training}[job["work"]](dalle, job)
    measured = dalle.vae if job["work"] == "pixels" else dalle
    of_vae = 0 if job["work"] == "pixels" else sum(parameter.numel() for parameter in dalle.vae.parameters())
    print(sum(parameter.numel() for parameter in measured.parameters()) - of_vae, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            call()
        print(time.perf_counter() - began, flush=True)


def check() -> None:
    """Generates with and without the repaired cache: the same noise must draw the same codes."""
    package = dalle_pytorch()
    drawn = []
    for repaired in (False, True):
        job = {"shape": _SHAPE, "batch": 2, "guidance": 1.0, "repaired": repaired}
        generate = generation(build(package, _SHAPE, repaired=repaired), job)
        torch.manual_seed(1)
        drawn.append(generate())
    if not torch.equal(*drawn):
        sys.exit("the repaired cache draws other codes than the model without one")
    print(f"dalle-pytorch {version('dalle-pytorch')} on torch {torch.__version__}: codes {tuple(drawn[0].shape)}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        slices(json.loads(Path(sys.argv[1]).read_text()))

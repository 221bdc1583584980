"""A Llama of the prior's shape and its own `generate`, from transformers: a peer of benchmarks/sampling.py.

    llama_prior.py JOB.json     answers numbers n on standard input with the seconds that n calls took
    llama_prior.py --check      does the package work here?

It imports nothing of Tessera; benchmarks/peers/tessera_prior.py says what a worker prints and when. Text ids, the pads
of a prior and codes make one vocabulary. Its generate compiles nothing on CPUs.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers  # type: ignore[import-not-found]
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]

# B images, T text tokens, I image tokens.

_KEPT_SHARE = 0.1  # of the codebook, as ours
_SHAPE = {"text_len": 4, "grid": 4, "text_ids": 20, "codes": 16, "dim": 64, "depth": 2, "heads": 1}


def build(shape: dict[str, int], *, dtype: str) -> Any:
    """A Llama with random weights, attention by PyTorch's fused kernels as it is by default."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["text_ids"] + shape["text_len"] + shape["codes"],
        hidden_size=shape["dim"],
        intermediate_size=4 * shape["dim"],
        num_hidden_layers=shape["depth"],
        num_attention_heads=shape["heads"],
        max_position_embeddings=shape["text_len"] + shape["grid"] ** 2,
        bos_token_id=None,
        eos_token_id=None,  # nothing ends an image early
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def generate(model: Any, job: dict[str, Any], text: Tensor) -> Tensor:
    """Draws the ids int64 [B, T + I] that follow text ids int64 [B, T]; with "first_row" those of one row."""
    shape = job["shape"]
    return model.generate(
        text,
        attention_mask=torch.ones_like(text),
        max_new_tokens=shape["grid"] if job["first_row"] else shape["grid"] ** 2,
        do_sample=True,
        temperature=1.0,
        top_k=math.ceil(_KEPT_SHARE * shape["codes"]),
        cache_implementation=job["cache"],
        pad_token_id=0,
    )


def random_text(shape: dict[str, int], batch: int) -> Tensor:
    """Ids int64 [B, T]."""
    return torch.randint(shape["text_ids"], (batch, shape["text_len"]))


def slices(job: dict[str, Any]) -> None:
    """Answers the lines of standard input."""
    torch.set_num_threads(job["threads"])
    print(f"transformers {transformers.__version__} Llama, torch {torch.__version__}", flush=True)
    sys.stdin.readline()
    model = build(job["shape"], dtype=job["dtype"])
    text = random_text(job["shape"], job["batch"])
    print(sum(parameter.numel() for parameter in model.parameters()), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            generate(model, job, text)
        print(time.perf_counter() - began, flush=True)


def check() -> None:
    """Generates a few ids."""
    job = {"shape": _SHAPE, "first_row": False, "cache": "static"}
    ids = generate(build(_SHAPE, dtype="float32"), job, random_text(_SHAPE, 2))
    print(f"transformers {transformers.__version__} on torch {torch.__version__}: ids {tuple(ids.shape)}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    else:
        slices(json.loads(Path(sys.argv[1]).read_text()))

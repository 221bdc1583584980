"""The `tessera` command: a table of names, each resolved when it is used, so that `tessera --help` imports no torch."""

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tessera
from tessera.errors import UserError, run_command


class Command(NamedTuple):
    """A subcommand: where its `main(argv) -> int` is, and what it does."""

    target: str  # "module:function"
    help: str


COMMANDS: dict[str, Command] = {
    "fit": Command("recipes.fit:main", "train all three models on captioned images, sized to the data and the time"),
    "ingest": Command("tessera.data.ingest_command:main", "check captioned images once and write a manifest of them"),
    "generate": Command("sampling.generate:main", "make images for captions"),
    "reconstruct": Command("dvae.reconstruct:main", "show what the dVAE keeps of an image"),
    "codebook": Command("dvae.codebook:main", "draw what each code decodes to and how often it is used"),
    "rerank": Command("sampling.rerank:main", "order images by how well they fit a caption"),
    "evaluate": Command("recipes.evaluate:main", "measure a model on captioned images"),
    "info": Command("tessera.info:main", "describe a model, a run, a fit, a checkpoint, token shards or a manifest"),
    "demo": Command("recipes.demo:main", "train on built-in scenes, generate held-out prompts, write a report"),
    "estimate": Command("recipes.estimate:main", "tell what training a dVAE or a prior takes, before it is trained"),
    "train-dvae": Command("dvae.train:main", "stage 1: train the image tokenizer"),
    "import-dvae": Command("dvae.import_openai:main", "take over a published dVAE instead of training one"),
    "encode": Command("dvae.encode:main", "stage 2: turn images and captions into token shards"),
    "train-prior": Command("recipes.train_prior:main", "stage 3: train the transformer over text and image tokens"),
    "train-scorer": Command("scorer.train:main", "train the model that ranks images for a caption"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `tessera COMMAND ...`.

    Args:
        argv: arguments without the program's name; None takes them from `sys.argv`.

    Returns:
        The exit code: 0 for success, 2 for a mistake of the user's, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(_dispatch, arguments)


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"tessera {tessera.__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}, {hint}")
    return _resolve(COMMANDS[name])(rest)


def _resolve(command: Command) -> Callable[[Sequence[str]], int]:
    module, function = command.target.split(":")
    return getattr(importlib.import_module(module), function)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        f"tessera {tessera.__version__}: text to image from discrete tokens",
        "",
        "usage: tessera COMMAND ...",
        "       tessera COMMAND --help     every setting with its type, default and unit",
        "       tessera --version",
        "",
        *(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()),
        "",
        "First steps:",
        "  tessera demo                                          see all of it on built-in scenes",
        "  tessera fit PATH --out my-model                       a folder of captioned images -> a model",
        '  tessera generate my-model "a red star" -n 4 --out out  a model -> images',
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

"""Command-line flags that the commands of this package share."""

import argparse

SCORER_CHOICES = ("auto", "clip", "likelihood", "combined", "none")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1 (default: auto, a GPU if there is one)",
    )


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Add --precision."""
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "bf16", "fp32"),
        help="number format of the matrix products (default: auto, bf16 where the hardware multiplies it)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sampling settings; a flag that is not given leaves the model's own default in force."""
    group = parser.add_argument_group("sampling (defaults: the model's own, tuned when it was trained)")
    group.add_argument(
        "--temperature",
        type=float,
        metavar="TAU",
        help="number >= 0; 0 takes the likeliest code every time, 1 is neutral",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely codes, integer >= 0; 0 keeps all")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="keep the likeliest codes that sum to P, number in (0, 1]; 1 keeps all"
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="keep codes at least P times as likely as the likeliest, number in [0, 1]; 0 keeps all",
    )
    group.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="number >= 0: logits become u + W (c - u); 0 ignores the prompt, 1 is off (and twice as fast), "
        "above 1 follows the prompt more closely",
    )

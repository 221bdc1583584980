"""Who takes part in benchmarks/tokenizer.py, and with which settings: everything that may be tuned stands here."""

from typing import Any

import torch

from dvae.model import DiscreteVAE, DiscreteVAEConfig
from tessera.config import from_plain
from tessera.precision import resolve_precision

Settings = dict[str, Any]

PEER_VERSION = "dalle-pytorch 1.6.6"
PEER_PARAMETERS = {8: 832_515, 4: 701_315}
# About as many parameters as the peer.
_SIZES: dict[int, Settings] = {
    8: {"patch_size": 4, "widths": [64, 128], "blocks": [1, 2]},
    4: {"patch_size": 4, "widths": [128], "blocks": [2]},
}
_FSQ: Settings = {"quantizer": "fsq", "levels": [8, 8, 4, 4]}
OURS: dict[str, Settings] = {
    "fsq": {"model": _FSQ},
    "fsq tanh": {"model": {**_FSQ, "fsq_activation": "tanh"}},
    "vq": {"model": {"quantizer": "vq", "codebook_size": 1024}},
    "gumbel": {"model": {"quantizer": "gumbel", "codebook_size": 1024}},
}
DEFAULT, ADVERSARIAL = "fsq", "fsq adversarial"
_OURS_ADVERSARIAL: Settings = {
    "model": _FSQ,
    "adversarial": {"weight": 0.5, "feature_matching": 0.1, "start": 0.2, "ramp": 0.2},
}
# How ours trains when only the time is given: whole pictures in small batches gained 0.4 dB over chosen crops.
_OURS_BY_TIME: Settings = {"trainer": {"batch_size": 12}}

_PEER_NETWORK: Settings = {"codes": 1024, "codebook_channels": 256, "channels": 64, "resnet_blocks": 1}
_PEER_LAYERS = {8: 3, 4: 2}
_PEER_ITS_OWN: Settings = {
    "batch_size": 8,
    "precision": resolve_precision("auto", "cpu").name,  # as ours
    "smooth_l1": False,
    "learning_rate": 1e-3,
    "decay": "exponential",
    "decay_rate": 0.98,
    "final_temperature": 0.5,
    "temperature_share": 1.0,
}
# Twice: with the rates and batch of its train_vae.py (and the temperature as documented there, over the whole run), and
# with what gave it better pictures in short trials. Ours is compared with the better one of the two.
PEERS: dict[str, Settings] = {
    "dalle-pytorch": _PEER_ITS_OWN,
    "dalle-pytorch tuned": {**_PEER_ITS_OWN, "batch_size": 16, "learning_rate": 3e-3},
}
# Compared with their siblings once, on emoji at f = 8 by steps.
SIDE_ISSUES = ("fsq tanh", "dalle-pytorch tuned")


def ours_settings(contestant: str, f: int, *, equal_steps: int | None = None) -> Settings:
    """The settings of one of ours: nested values of `dvae.train.TrainConfig`.

    Args:
        contestant: a name of `OURS`, or `ADVERSARIAL`.
        f: downsampling.
        equal_steps: the batch size that all share where steps are equal; None for ours own way of training.
    """
    settings = _OURS_ADVERSARIAL if contestant == ADVERSARIAL else OURS[contestant]
    training = {"trainer": {"batch_size": equal_steps}} if equal_steps else _OURS_BY_TIME
    return {**training, **settings, "model": {**settings["model"], **_SIZES[f]}}


def peer_settings(contestant: str, f: int, *, equal_steps: int | None = None) -> Settings:
    """The settings of the peer's worker; arguments as for `ours_settings`."""
    settings = {**_PEER_NETWORK, **PEERS[contestant], "num_layers": _PEER_LAYERS[f]}
    return {**settings, "batch_size": equal_steps} if equal_steps else settings


def num_parameters(contestant: str, f: int) -> int:
    """Trainable numbers of one of ours, the discriminator left out."""
    config = from_plain(DiscreteVAEConfig, ours_settings(contestant, f)["model"], source=__file__)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiscreteVAE(config).parameters())

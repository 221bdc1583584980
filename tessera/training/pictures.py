"""Puts pictures that a model makes while it is trained where its curves are."""

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray


def log_picture(pl_module: pl.LightningModule, name: str, picture: NDArray[np.uint8]) -> None:
    """Gives a picture uint8 [H, W, 3] to every logger of a training that can show one."""
    for logger in pl_module.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, pl_module.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=pl_module.global_step)

"""The contrastive loss of image and caption embeddings (InfoNCE; Radford et al. 2021, figure 3)."""

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, E embedding width, Q most captions of one image.


def contrastive_loss(images: Tensor, texts: Tensor, *, scale: Tensor, not_negative: Tensor) -> Tensor:
    """Asks which image of the batch belongs to a caption, and which caption to an image.

    Args:
        images: float [B, E], unit length.
        texts: float [B, E], unit length; row b belongs to image b.
        scale: float scalar, the inverse temperature.
        not_negative: bool [B, B], images in rows; off the diagonal, True where a caption happens to fit an image too.
            Such a pair is left out, neither right nor wrong.

    Returns:
        float32 scalar: the mean of the image-to-caption and the caption-to-image cross-entropy, in nats.
    """
    # A product in bf16 would round cosines by more than similar captions differ.
    with torch.autocast(images.device.type, enabled=False):
        logits = scale.float() * images.float() @ texts.float().T  # [B, B]
    diagonal = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(not_negative & ~diagonal, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fitting_pairs(first: Tensor, known: Tensor) -> Tensor:
    """Which captions of a batch fit which of its images, as far as equal words tell.

    Args:
        first: int64 [B], a hash of the caption that each image is shown with.
        known: int64 [B, Q], hashes of all captions of each image.

    Returns:
        bool [B, B], True where the caption of the column is one of the row's image, or the other way round.
    """
    fits = (known[:, None, :] == first[None, :, None]).any(dim=2)  # [B, B]
    return fits | fits.T

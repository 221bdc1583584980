"""What the prior itself thinks of an image: log p(image | text) - log p(image), a scorer that needs no training.

The plain likelihood prefers images that are likely under any text, such as empty backgrounds; the ratio, pointwise
mutual information of image and text, asks how much the text explains.

Legend: B images, T text tokens, I image tokens, K codebook size.
"""

import torch
from torch import Tensor

from tessera.errors import UserError
from transformer.model import Prior

MAX_LOGITS = 2**26  # numbers in one forward's logits, 256 MiB in float32


@torch.inference_mode()
def likelihood_ratio(prior: Prior, codes: Tensor, text_ids: Tensor, *, max_rows: int = 64) -> Tensor:
    """Score images against texts, teacher-forced: one forward over all positions, no decode loop.

    Args:
        prior: the model, in evaluation mode.
        codes: int64 [B, I].
        text_ids: int64 [B, T], one row per image.
        max_rows: most images in one forward (each takes two rows); fewer where the logits would be too large.

    Returns:
        log p(codes | text) - log p(codes | empty caption) in nats, float64 [B], on the prior's device. A row's value
        does not depend on the other rows.

    Raises:
        UserError: shapes do not fit the prior.
    """
    layout = prior.layout
    if codes.ndim != 2 or codes.shape[1] != layout.image_len:
        raise UserError(f"codes have shape {tuple(codes.shape)}, expected [B, {layout.image_len}]")
    if tuple(text_ids.shape) != (codes.shape[0], layout.text_len):
        raise UserError(f"text_ids have shape {tuple(text_ids.shape)}, expected {(codes.shape[0], layout.text_len)}")
    device = next(prior.parameters()).device
    codes, text_ids = codes.to(device), text_ids.to(device)
    null = prior.null_text_ids().to(device)[None, :]  # [1, T]
    rows = max(1, min(max_rows, MAX_LOGITS // (2 * layout.image_len * layout.codebook_size)))
    ratios = [torch.zeros(0, dtype=torch.float64, device=device)]
    for start in range(0, codes.shape[0], rows):
        part, texts = codes[start : start + rows], text_ids[start : start + rows]
        twice = torch.cat([part, part])  # [2b, I]
        logits = prior(torch.cat([texts, null.expand_as(texts)]), twice).image_logits.float()  # [2b, I, K]
        chosen = logits.gather(2, twice[:, :, None])[:, :, 0] - logits.logsumexp(dim=2)  # [2b, I]
        conditional, unconditional = chosen.double().sum(dim=1).chunk(2)
        ratios.append(conditional - unconditional)
    return torch.cat(ratios)

"""Pure functions on next-code logits: guidance, temperature, top-k, top-p, min-p, and the choice of one code.

Legend: B rows, K codebook size. No function changes the tensor that it is given. The order in which the decode loop
applies them is guidance, temperature, top-k, top-p, min-p, choice: the filters see the distribution that is drawn from.
Every setting is one number for all rows or one for each; numbers are checked, tensors are not (looking at them on a GPU
would make every step wait). A row's result depends on that row alone.
"""

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from tessera.errors import UserError


def check_temperature(value: float) -> None:
    """Raise UserError unless `value` is 0 (greedy) or a number from 1e-6 to 1e6, beyond which fp32 overflows."""
    if not _is_number(value) or not (value == 0 or 1e-6 <= value <= 1e6):
        raise UserError(f"temperature is {value!r}, expected a number >= 0 (0 takes the most likely code every time)")


def check_top_k(value: int) -> None:
    """Raise UserError unless `value` is an integer >= 0 (0 is off)."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise UserError(f"top_k is {value!r}, expected an integer >= 0 (0 keeps all codes)")


def check_top_p(value: float) -> None:
    """Raise UserError unless `value` is in (0, 1] (1 is off)."""
    if not _is_number(value) or not 0 < value <= 1:
        raise UserError(f"top_p is {value!r}, expected a number in (0, 1] (1 keeps all codes)")


def check_min_p(value: float) -> None:
    """Raise UserError unless `value` is in [0, 1] (0 is off)."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise UserError(f"min_p is {value!r}, expected a number in [0, 1] (0 keeps all codes)")


def check_guidance(value: float) -> None:
    """Raise UserError unless `value` is from 0 (unconditional; 1 is conditional) to 1e6, where fp32 would overflow."""
    if not _is_number(value) or not 0 <= value <= 1e6:
        raise UserError(f"guidance is {value!r}, expected a number >= 0 (0 ignores the prompt, 1 is off)")


def guidance(conditional: Tensor, unconditional: Tensor, *, weight: float | Tensor) -> Tensor:
    """Classifier-free guidance u + w (c - u): w = 0 is unconditional, w = 1 is conditional, exactly, w > 1 exaggerates.

    Some systems write c + w (c - u); their w is ours minus 1.

    Args:
        conditional: logits given the text, float [B, K].
        unconditional: logits given the empty caption, float [B, K].
        weight: w, finite and >= 0, one number or float [B].

    Returns:
        Guided logits [B, K].

    Raises:
        UserError: the weight is out of range, or the shapes differ.

    Paper: Ho and Salimans, Classifier-Free Diffusion Guidance (2207.12598), with w counted from the unconditional end.
    """
    if not isinstance(weight, Tensor):
        check_guidance(weight)
    if conditional.shape != unconditional.shape:
        raise UserError(
            f"conditional logits have shape {tuple(conditional.shape)}, unconditional {tuple(unconditional.shape)}: "
            "expected the same"
        )
    # lerp returns its ends exactly; the formula as written would give c only up to rounding at w = 1.
    return torch.lerp(unconditional, conditional, _per_row(weight, conditional))


def temperature(logits: Tensor, value: float | Tensor) -> Tensor:
    """Divide logits by a temperature; 0 keeps only the most likely code (the first one among equals).

    Args:
        logits: float [B, K].
        value: tau, finite and >= 0, one number or float [B].

    Returns:
        Logits [B, K].

    Raises:
        UserError: the temperature is out of range.
    """
    if not isinstance(value, Tensor):
        check_temperature(value)
    value = _per_row(value, logits)
    is_greedy = value == 0
    best = logits.argmax(dim=-1, keepdim=True)  # [B, 1]
    is_best = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)
    return (logits / value.masked_fill(is_greedy, 1)).masked_fill(is_greedy & ~is_best, -math.inf)


def top_k(logits: Tensor, value: int | Tensor, *, largest: int | None = None) -> Tensor:
    """Keep the k largest logits of each row, the others become -inf; equals of the k-th largest are all kept.

    Keeping equals makes the result a function of the row's values alone, not of the order in which a sort visits them.

    Args:
        logits: float [B, K].
        value: k >= 0, one number or int64 [B]; 0, or k >= K, keeps all.
        largest: the largest k below K among the rows, where it is known; otherwise a GPU is waited for.

    Returns:
        Logits [B, K].

    Raises:
        UserError: k is negative or not an integer.
    """
    if not isinstance(value, Tensor):
        check_top_k(value)
    num_codes = logits.shape[-1]
    value = torch.as_tensor(value, device=logits.device).expand(len(logits))[:, None]  # [B, 1]
    keeps_all = (value == 0) | (value >= num_codes)
    if largest is None:
        largest = int(value.masked_fill(keeps_all, 0).max())
    if largest == 0:
        return logits
    ordered = logits.topk(largest, dim=-1, sorted=True).values
    threshold = ordered.gather(-1, (value - 1).clamp(0, largest - 1)).masked_fill(keeps_all, -math.inf)
    return logits.masked_fill(logits < threshold, -math.inf)


def top_p(logits: Tensor, value: float | Tensor) -> Tensor:
    """Nucleus filter: keep the smallest set of most likely codes whose probabilities sum to at least p.

    The most likely code is always kept; among equals at the border the lower code number is kept.

    Args:
        logits: float [B, K].
        value: p in (0, 1], one number or float [B]; 1 keeps all.

    Returns:
        Logits [B, K], -inf outside the set.

    Raises:
        UserError: p is out of range.

    Paper: Holtzman et al., The Curious Case of Neural Text Degeneration (1904.09751), section 3.1.
    """
    if not isinstance(value, Tensor):
        check_top_p(value)
    value = _per_row(value, logits)
    ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)  # [B, K] both
    mass_before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
    # A hair of slack: sums such as 0.4 + 0.3 miss 0.7 by rounding, and a code too many would be kept.
    drop = (mass_before >= value.double() - 1e-6) & (value < 1)
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)


def min_p(logits: Tensor, value: float | Tensor) -> Tensor:
    """Keep codes whose probability is at least `value` times that of the most likely code of the row.

    Args:
        logits: float [B, K].
        value: in [0, 1], one number or float [B]; 0 keeps all, 1 keeps the most likely code and its equals.

    Returns:
        Logits [B, K], -inf elsewhere.

    Raises:
        UserError: the value is out of range.

    Paper: Nguyen et al., Turning Up the Heat: Min-p Sampling (2407.01082), section 3.
    """
    if not isinstance(value, Tensor):
        check_min_p(value)
    # p_i >= v * p_max in logits: no softmax is needed, the normalizer cancels; log 0 = -inf keeps all.
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + _per_row(value, logits).log(), -math.inf)


def choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one code per row by inverting the cumulative distribution at one uniform number per row.

    One number per row, where Gumbel-max needs K: the stream of an image costs nothing next to the model, and a row's
    draw depends on that row alone. The sum runs in float64, so no code with probability above 2^-53 is out of reach,
    and a code with probability 0 is never drawn.

    Args:
        logits: float [B, K]; -inf marks a code that cannot be drawn.
        uniform: float64 [B] in [0, 1).

    Returns:
        Codes, int64 [B].
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # [B, K]
    # The sum is 1 only up to float32 rounding. With uniform <= 1 - 2^-53 the product stays below it in float64, too.
    target = uniform * cumulative[:, -1]
    codes = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return codes.clamp_(max=logits.shape[-1] - 1)  # only NaN logits reach K; the decode loop reports them


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _per_row(value: float | Tensor, logits: Tensor) -> Tensor:
    """A number, or one per row, as [B, 1] in the dtype of logits [B, K].

    One arithmetic for both: what a row gets must not depend on whether its neighbors ask for the same.
    """
    return torch.as_tensor(value, dtype=logits.dtype, device=logits.device).expand(len(logits))[:, None]

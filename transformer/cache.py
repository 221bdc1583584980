"""The key-value cache of the prior: a value that the caller owns and hands to `prefill` and `decode`."""

from dataclasses import dataclass

import torch
from torch import Tensor

# L layers, B rows, H heads, N positions, D head width.


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions seen so far.

    Attributes:
        keys: [L, B, H, N, D]; positions not yet seen hold zeros.
        values: [L, B, H, N, D].
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def empty(
        cls,
        *,
        layers: int,
        batch_size: int,
        heads: int,
        seq_len: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "KVCache":
        """A cache of zeros."""
        shape = (layers, batch_size, heads, seq_len, head_dim)
        return cls(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [B, H, n, D] at positions start .. start + n - 1, in place."""
        end = start + keys.shape[2]
        self.keys[layer, :, :, start:end] = keys
        self.values[layer, :, :, start:end] = values

    def expand(self, index: Tensor) -> "KVCache":
        """A new cache whose row b is a copy of row index[b]: candidates of a prompt start from its one prefix."""
        return KVCache(self.keys.index_select(1, index), self.values.index_select(1, index))

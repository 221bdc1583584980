"""Linear layers whose weights are stored and multiplied in bf16, in a model that otherwise computes in fp32.

Autocast converts the weights again at every step (it remembers them only while they train), and on CPUs it drags
attention over a handful of queries into bf16 kernels that are two to three times slower than the fp32 ones. Converting
the weights once, and nothing else, keeps the whole gain of bf16 matrix units where the time goes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bf16Linear(nn.Linear):
    """A linear layer with bf16 weights: input rounded to bf16, output in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias).to(input.dtype)


def use_bf16_weights(model: nn.Module) -> None:
    """Turn every linear layer of a frozen model into one with bf16 weights, in place.

    Args:
        model: in evaluation mode; layers that are not nn.Linear keep their weights.
    """
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            module.to(torch.bfloat16)
            # Same parameters, other arithmetic; replacing the object would have to find every parent that holds it.
            module.__class__ = Bf16Linear

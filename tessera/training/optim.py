"""The optimizer and learning-rate schedule of every stage.

Hidden weights are updated by Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"): the
momentum matrix is replaced by a nearby orthogonal one, so that every direction of a weight learns at the same rate.
Everything else (embeddings, heads, gains, biases) is updated by AdamW. In short runs on small corpora this is the
largest single gain of all the settings here: at 350 equal steps a dVAE on scenes reached 25.2 dB instead of 20.0.

`torch.optim.Muon` takes matrices only; convolution kernels, which make up the whole dVAE, need this one.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tessera.errors import UserError
from tessera.training.processes import like, part_here, whole

# The quintic iteration of the Muon write-up: coefficients chosen for slope at zero, five rounds in bf16.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_ROUNDS = 5
# Numbers in the matrices that are made orthogonal together: a product of many is faster, but all updates of a step at
# once would take as much memory as the weights, and whole ones in every process where each holds a part.
ORTHOGONALIZED_AT_ONCE = 2**27
# A step of size 0.2 sqrt(max(rows, columns)) has AdamW's typical root mean square, so that both kinds of parameter
# share one learning rate (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
_ADAMW_MATCH = 0.2


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon and AdamW with warm-up, cosine decay and weight averaging."""

    hidden: Literal["muon", "adamw"] = "muon"
    """what updates the weights of hidden layers; all other parameters are updated by adamw"""
    learning_rate: float = 3e-3
    """peak learning rate; the best one falls about with the square root of the width"""
    momentum: float = 0.95
    """muon: decay of the gradient's running mean"""
    betas: tuple[float, float] = (0.9, 0.95)
    """adamw: decay rates of the gradient's mean and square"""
    weight_decay: float = 0.05
    """decay of hidden weights; embeddings, gains and biases are not decayed"""
    warmup: float = 0.03
    """share of training, 0 to 1, over which the rate rises linearly from zero"""
    decay_share: float = 1.0
    """share of training at which the rate has fallen to its final value, above warmup and at most 1"""
    final_rate: float = 0.02
    """the rate at the end as a share of the peak"""
    embedding_rate: float = 10.0
    """learning rate of embedding tables as a multiple of learning_rate"""
    clip_norm: float | None = 1.0
    """largest norm of the gradient; null for no limit"""
    ema_horizon: float = 0.03
    """share of training over which weights are averaged; 0 switches averaging off"""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or not 0 <= self.warmup < 1 or not 0 <= self.ema_horizon < 1:
            raise UserError(
                f"optim needs learning_rate > 0 and warmup and ema_horizon in [0, 1); "
                f"got {self.learning_rate}, {self.warmup} and {self.ema_horizon}"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optim.clip_norm must be positive, or null for no limit; got {self.clip_norm}")
        if not self.warmup < self.decay_share <= 1:
            raise UserError(
                f"optim.decay_share must lie above warmup ({self.warmup}) and be at most 1; got {self.decay_share}"
            )


def rate_at(progress: float, config: OptimizerConfig) -> float:
    """The learning rate's factor at `progress` in [0, 1] of training: warm-up, a cosine to `final_rate`, then flat."""
    if progress < config.warmup:
        return max(progress / config.warmup, 1e-3)
    done = min(1.0, (progress - config.warmup) / (config.decay_share - config.warmup))
    return config.final_rate + (1 - config.final_rate) * (1 + math.cos(math.pi * done)) / 2


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> "MuonAdamW":
    """`config.hidden` for the weights of hidden linear and convolution layers of `module`, AdamW for the rest.

    A layer is hidden unless its name ends in "head" or "stem", the module's ends toward data, where rows are classes or
    pixels and not directions of one space. Embedding tables, unless they are part of a head, learn `embedding_rate`
    times as fast: a row starts at unit size and gets a gradient only when its token occurs.
    """
    hidden: list[nn.Parameter] = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.endswith(("head", "stem")):
            hidden.append(cast(nn.Parameter, layer.weight))
    hidden = [weight for weight in hidden if weight.requires_grad]
    hidden_ids = {id(weight) for weight in hidden}
    tables = [
        cast(nn.Parameter, layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Embedding) and not any(part.endswith("head") for part in name.split("."))
    ]
    tables = [weight for weight in tables if weight.requires_grad]
    elsewhere = hidden_ids | {id(weight) for weight in tables}
    rest = [weight for weight in module.parameters() if weight.requires_grad and id(weight) not in elsewhere]
    return MuonAdamW(hidden, rest, config, tables=tables)


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer, two update rules.

    Args:
        hidden: parameters of 2 or 4 dimensions, updated by `config.hidden` and decayed; Muon takes kernels [O, I, h, w]
            for matrices [O, I h w].
        rest: parameters of any shape, updated by AdamW.
        config: rates; `learning_rate` applies to all.
        tables: embeddings, updated by AdamW at `embedding_rate` times the learning rate.
    """

    def __init__(
        self,
        hidden: list[nn.Parameter],
        rest: list[nn.Parameter],
        config: OptimizerConfig,
        *,
        tables: list[nn.Parameter] | None = None,
    ) -> None:
        common = {"lr": config.learning_rate, "momentum": config.momentum, "betas": config.betas, "eps": 1e-8}
        groups: list[dict[str, Any]] = []
        if hidden:
            groups.append(
                {**common, "params": hidden, "rule": config.hidden, "weight_decay": config.weight_decay, "rate": 1.0}
            )
        if rest:
            groups.append({**common, "params": rest, "rule": "adamw", "rate": 1.0})
        if tables:
            groups.append({**common, "params": tables, "rule": "adamw", "rate": config.embedding_rate})
        super().__init__(groups, defaults={})
        self._common = common
        self.product_dtype = torch.bfloat16
        """in which Muon's products are computed; float32 where training is to be repeatable to the last digits"""

    def add_network(self, parameters: list[nn.Parameter], *, rate: float, betas: tuple[float, float]) -> None:
        """Adds a network that learns against the first one, by AdamW; its gradient is clipped apart from all others.

        Args:
            parameters: of the network.
            rate: its learning rate as a multiple of the others'.
            betas: decay rates of its gradient's mean and square.
        """
        self.add_param_group(
            {**self._common, "params": parameters, "rule": "adamw", "rate": rate, "betas": betas, "apart": "adversary"}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["rule"] == "muon":
                self._step_muon(parameters, group)
            elif parameters:
                self._step_adamw(parameters, group)
        return loss

    def _step_muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for shape, alike in by_shape.items():
            at_once = max(1, ORTHOGONALIZED_AT_ONCE // shape.numel())
            for first in range(0, len(alike), at_once):
                self._step_alike(alike[first : first + at_once], group)

    def _step_alike(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """The step of parameters of one shape."""
        updates = []  # [rows, columns] each
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            # Nesterov; whole where processes hold parts, for no part of it knows the directions
            updates.append(whole(gradient.lerp(state["momentum"], group["momentum"])).flatten(1))
        orthogonal = orthogonalize(torch.stack(updates), dtype=self.product_dtype)
        scale = _ADAMW_MATCH * math.sqrt(max(orthogonal.shape[1:]))
        for parameter, update in zip(parameters, orthogonal.unbind(0), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            change = like(update.reshape(parameter.shape).to(parameter.dtype), parameter)
            part_here(parameter).add_(part_here(change), alpha=-group["lr"] * scale)

    def _step_adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["steps"] = 0
                state["mean"] = torch.zeros_like(parameter)
                state["square"] = torch.zeros_like(parameter)
            state["steps"] += 1
        steps = [self.state[parameter]["steps"] for parameter in parameters]
        # one number at a time: where processes hold parts, each can change its own
        gradients = [part_here(parameter.grad) for parameter in parameters if parameter.grad is not None]
        means = [part_here(self.state[parameter]["mean"]) for parameter in parameters]
        squares = [part_here(self.state[parameter]["square"]) for parameter in parameters]
        values = [part_here(parameter) for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        if group.get("weight_decay"):
            torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - beta2**count) for count in steps])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(values, means, list(roots), [-group["lr"] / (1 - beta1**count) for count in steps])


def orthogonalize(matrices: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Replaces each matrix U S V^T of [n, rows, columns] by approximately U V^T, computed in `dtype`.

    The singular values of the result lie between about 0.7 and 1.2: close enough for an update's direction, and reached
    with matrix products alone.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

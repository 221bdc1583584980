"""The optimizer: orthogonal updates, AdamW as in the library, one schedule."""

import math

import pytest
import torch
from torch import nn

from tessera.errors import UserError
from tessera.training.optim import MuonAdamW, OptimizerConfig, build_optimizer, orthogonalize, rate_at


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 16, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ vh)).sum(dim=(1, 2)) / (result.norm(dim=(1, 2)) * (u @ vh).norm(dim=(1, 2)))
    assert cosine.min() > 0.95


def test_few_matrices_at_once_are_updated_like_many(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(matrices: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
        counts.append(len(matrices))
        return orthogonalize(matrices, dtype=dtype)

    monkeypatch.setattr("tessera.training.optim.orthogonalize", counted)

    def trained(at_once: int) -> list[nn.Parameter]:
        monkeypatch.setattr("tessera.training.optim.ORTHOGONALIZED_AT_ONCE", at_once)
        draw = torch.Generator().manual_seed(0)
        matrices = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in [(6, 4)] * 5 + [(4, 6)]]
        optimizer = MuonAdamW(matrices, [], OptimizerConfig(learning_rate=0.1))
        for _ in range(2):
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=draw)
            optimizer.step()
        return matrices

    torch.testing.assert_close(trained(2 * 6 * 4), trained(2**20))
    assert counts == [2, 2, 1, 1] * 2 + [5, 1] * 2


def test_the_rest_is_updated_like_adamw() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(7))
    theirs = nn.Parameter(ours.detach().clone())
    config = OptimizerConfig(learning_rate=0.01)
    first = MuonAdamW([], [ours], config)
    second = torch.optim.AdamW([theirs], lr=0.01, betas=config.betas, weight_decay=0.0)
    for _ in range(5):
        gradient = torch.randn(7)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours, theirs)


def test_hidden_weights_can_be_left_to_adamw_with_its_decay() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    first = build_optimizer(ours, OptimizerConfig(hidden="adamw", learning_rate=0.02, weight_decay=0.3))
    second = torch.optim.AdamW(theirs.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.3)
    for _ in range(5):
        gradient = torch.randn(4, 5)
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        first.step()
        second.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_another_network_has_a_rate_of_its_own() -> None:
    model, judge = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.1))
    optimizer.add_network(list(judge.parameters()), rate=0.25, betas=(0.5, 0.9))
    before = judge.weight.detach().clone()
    judge(torch.ones(1, 3)).sum().backward()
    optimizer.param_groups[-1]["lr"] = 0.1 * optimizer.param_groups[-1]["rate"]  # as the clock sets it
    optimizer.step()
    torch.testing.assert_close(before - judge.weight, torch.full((1, 3), 0.025))
    assert optimizer.param_groups[-1]["apart"], "its gradient is not clipped with the model's"


def test_heads_embeddings_and_gains_are_left_to_adamw() -> None:
    model = nn.ModuleDict(
        {
            "hidden": nn.Linear(4, 4),
            "text_head": nn.Linear(4, 9),
            "stem": nn.Conv2d(3, 4, 3),
            "embedding": nn.Embedding(5, 4),
        }
    )
    optimizer = build_optimizer(model, OptimizerConfig())
    rules = {id(p): group["rule"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if rules[id(p)] == "muon"} == {"hidden.weight"}
    assert len(rules) == len(list(model.parameters()))


def test_a_convolution_counts_as_a_matrix() -> None:
    layer = nn.Conv2d(4, 6, 3, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimizerConfig(learning_rate=0.1, weight_decay=0.0))
    layer(torch.randn(2, 4, 8, 8)).square().sum().backward()
    optimizer.step()
    update = (before - layer.weight.detach()).flatten(1)  # [6, 36]
    values = torch.linalg.svdvals(update) / (0.1 * 0.2 * math.sqrt(36))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_its_state_survives_a_round_trip() -> None:
    torch.manual_seed(0)

    def steps(optimizer: MuonAdamW, model: nn.Module, count: int, start: int) -> None:
        for step in range(start, start + count):
            optimizer.zero_grad()
            model(torch.full((1, 3), float(step))).sum().backward()
            optimizer.step()

    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.load_state_dict(first.state_dict())
    optimizer = build_optimizer(first, OptimizerConfig())
    other = build_optimizer(second, OptimizerConfig())
    steps(optimizer, first, 4, 0)
    steps(other, second, 2, 0)
    resumed = build_optimizer(second, OptimizerConfig())
    resumed.load_state_dict(other.state_dict())
    steps(resumed, second, 2, 2)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_the_schedule_warms_up_and_decays() -> None:
    config = OptimizerConfig(warmup=0.1, final_rate=0.05)
    assert rate_at(0.05, config) == pytest.approx(0.5)
    assert rate_at(0.1, config) == pytest.approx(1)
    assert rate_at(1.0, config) == pytest.approx(0.05)
    rates = [rate_at(0.1 + 0.009 * step, config) for step in range(101)]
    assert rates == sorted(rates, reverse=True)


def test_the_rate_may_have_fallen_before_the_end() -> None:
    config = OptimizerConfig(warmup=0.0, decay_share=0.4, final_rate=0.0125)  # the dVAE of the DALL-E paper
    assert rate_at(0.2, config) == pytest.approx((1 + 0.0125) / 2)
    assert rate_at(0.4, config) == pytest.approx(0.0125)
    assert rate_at(0.7, config) == pytest.approx(0.0125)
    with pytest.raises(UserError, match=r"above warmup \(0.5\) and be at most 1; got 0.4"):
        OptimizerConfig(warmup=0.5, decay_share=0.4)


def test_impossible_rates_are_refused() -> None:
    with pytest.raises(UserError, match="clip_norm must be positive, or null for no limit; got 0"):
        OptimizerConfig(clip_norm=0.0)
    with pytest.raises(UserError, match="got 0"):
        OptimizerConfig(learning_rate=0)

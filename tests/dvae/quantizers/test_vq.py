"""Vector quantization: gradients against formulas and finite differences; a codebook that fills and survives."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dvae.quantizers.vq import VectorQuantizer, VQConfig, nearest_codes
from tessera.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
UPDATES: tuple[Literal["ema", "gradient"], ...] = ("ema", "gradient")


def quantizer_of(codebook: Tensor, **settings: Any) -> VectorQuantizer:
    """A quantizer that holds these unit vectors, all of them in even use, and has its first batch behind it."""
    quantizer = VectorQuantizer(len(codebook), codebook.shape[1], VQConfig(**settings)).to(codebook.dtype)
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
        quantizer.running.copy_(F.pad(codebook, (0, 1), value=1.0) / len(codebook))
        quantizer.initialized.fill_(True)
    return quantizer


def directions(count: int, channels: int, *, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, channels, generator=torch.Generator().manual_seed(seed)), dim=1)


def as_grid(vectors: Tensor, *, height: int = 1) -> Tensor:
    """Vectors [N, D] as latents [1, D, height, N / height]."""
    return vectors.T.reshape(1, vectors.shape[1], height, -1)


def state(quantizer: VectorQuantizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor], *, atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0.0, atol=atol)


def test_the_code_is_the_nearest_of_the_codebook() -> None:
    vectors, codebook = 2 * torch.randn(700, 5), torch.randn(600, 5)  # more scores than are held at once
    assert torch.equal(nearest_codes(vectors, codebook), torch.cdist(vectors, codebook).argmin(dim=1))


def test_latents_are_compared_by_their_direction() -> None:
    codebook = directions(40, 4)
    latents = torch.randn(2, 4, 5, 3)
    codes = quantizer_of(codebook).eval()(latents).codes
    cosine = torch.einsum("kd,bdhw->bkhw", codebook, latents)
    assert torch.equal(codes, cosine.argmax(dim=1))
    scaled = latents * torch.rand(2, 1, 5, 3).add(0.1)
    assert torch.equal(quantizer_of(codebook).eval()(scaled).codes, codes)


@pytest.mark.parametrize("update", UPDATES)
def test_the_embedding_is_what_the_look_up_returns_with_unit_variance(update: Literal["ema", "gradient"]) -> None:
    quantizer = VectorQuantizer(64, 8, VQConfig(update=update)).eval()
    with torch.no_grad():
        quantizer.codebook.mul_(1.7)  # an optimizer leaves codes off the sphere
    result = quantizer(torch.randn(2, 8, 4, 6))
    assert torch.equal(result.embedding, quantizer.lookup(result.codes))
    torch.testing.assert_close(result.embedding.square().mean(dim=1), torch.ones(2, 4, 6))


def test_the_gradient_passes_straight_through_to_the_direction_of_the_latent() -> None:
    quantizer = quantizer_of(directions(20, 6).double()).eval()
    latents = torch.randn(2, 6, 3, 2, dtype=torch.double, requires_grad=True)
    weights = torch.randn(2, 6, 3, 2, dtype=torch.double)
    (quantizer(latents).embedding * weights).sum().backward()
    # of sqrt(6) z / |z|: the part of the weights across z, over |z|
    length = latents.detach().norm(dim=1, keepdim=True)
    unit = latents.detach() / length
    across = weights - unit * (unit * weights).sum(dim=1, keepdim=True)
    torch.testing.assert_close(latents.grad, math.sqrt(6) * across / length)


def test_the_commitment_is_a_squared_distance_on_the_sphere_with_the_gradient_of_finite_differences() -> None:
    quantizer = quantizer_of(directions(12, 3).double()).eval()
    latents = torch.randn(1, 3, 2, 3, dtype=torch.double, requires_grad=True)
    result = quantizer(latents)
    cosine = F.cosine_similarity(latents, quantizer.lookup(result.codes), dim=1)
    torch.testing.assert_close(result.terms["commitment"], (2 - 2 * cosine).mean())
    assert torch.autograd.gradcheck(lambda z: quantizer(z).terms["commitment"], (latents,))


def test_codes_that_learn_by_gradient_have_a_term_of_their_own() -> None:
    quantizer = quantizer_of(directions(12, 3).double(), update="gradient").eval()
    latents = torch.randn(1, 3, 2, 3, dtype=torch.double, requires_grad=True)
    codebook = quantizer.codebook

    def codebook_term(values: Tensor) -> Tensor:
        return torch.func.functional_call(quantizer, {"codebook": values}, (latents.detach(),)).terms["codebook"]

    assert torch.autograd.gradcheck(codebook_term, (codebook.detach().clone().requires_grad_(),))
    result = quantizer(latents)
    torch.testing.assert_close(result.terms["codebook"], result.terms["commitment"])
    inputs = (latents, codebook)
    only_codes = torch.autograd.grad(result.terms["codebook"], inputs, allow_unused=True, retain_graph=True)
    only_latents = torch.autograd.grad(result.terms["commitment"], inputs, allow_unused=True, retain_graph=True)
    through = torch.autograd.grad(result.embedding.square().mul(latents.detach()).sum(), inputs, allow_unused=True)
    assert [gradient is None for gradient in (*only_codes, *only_latents, *through)] == [
        *(True, False),
        *(False, True),
        *(False, True),
    ]


def test_a_code_is_the_direction_of_the_running_mean_of_its_latents() -> None:
    codebook = torch.eye(3)
    quantizer = quantizer_of(codebook, decay=0.9, dead_below=0.0).train()
    vectors = F.normalize(torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0], [1.0, 4.0, 0.0], [5.0, 1.0, 1.0]]), dim=1)
    result = quantizer(as_grid(vectors))
    assert result.codes.flatten().tolist() == [0, 0, 1, 0]
    sums = [0.9 * codebook[0] / 3 + 0.1 * (vectors[0] + vectors[1] + vectors[3]) / 4]
    sums += [0.9 * codebook[1] / 3 + 0.1 * vectors[2] / 4]
    torch.testing.assert_close(quantizer.codebook[:2], F.normalize(torch.stack(sums), dim=1))
    torch.testing.assert_close(quantizer.codebook[2], codebook[2])
    torch.testing.assert_close(quantizer.share, torch.tensor([0.3 + 0.075, 0.3 + 0.025, 0.3]))


def test_codes_are_of_no_weight_in_a_step_that_the_codebook_takes_by_gradient() -> None:
    quantizer = quantizer_of(directions(8, 4), update="gradient", dead_below=0.0).train()
    before = quantizer.codebook.detach().clone()
    quantizer(torch.randn(2, 4, 5, 5))
    assert torch.equal(quantizer.codebook, before)
    assert float(quantizer.share.sum()) == pytest.approx(1)


@pytest.mark.parametrize("update", UPDATES)
def test_evaluation_changes_nothing(update: Literal["ema", "gradient"]) -> None:
    quantizer = VectorQuantizer(32, 4, VQConfig(update=update)).eval()
    before = state(quantizer)
    random_numbers = torch.get_rng_state()
    quantizer(torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    assert_same_state(state(quantizer), before)
    assert torch.equal(torch.get_rng_state(), random_numbers)


def test_codes_do_not_depend_on_the_rest_of_the_batch() -> None:
    quantizer = VectorQuantizer(200, 8, VQConfig()).eval()
    latents = torch.randn(9, 8, 6, 5)
    alone = torch.cat([quantizer(one).codes for one in latents.split(1)])
    assert torch.equal(quantizer(latents).codes, alone)


def test_it_computes_in_fp32_under_bf16_autocast() -> None:
    quantizer = VectorQuantizer(64, 8, VQConfig())
    latents = torch.randn(4, 8, 8, 16).bfloat16()
    other = copy.deepcopy(quantizer)
    torch.manual_seed(1)
    expected = other(latents.float())
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        result = quantizer(latents)
        looked_up = quantizer.eval().lookup(result.codes)
    assert torch.equal(result.codes, expected.codes)
    assert result.embedding.dtype == looked_up.dtype == result.terms["commitment"].dtype == torch.float32
    torch.testing.assert_close(result.terms["commitment"], expected.terms["commitment"])
    assert_same_state(state(quantizer), state(other))


@pytest.mark.parametrize("update", UPDATES)
def test_a_saved_state_goes_on_as_if_it_had_never_been_saved(update: Literal["ema", "gradient"]) -> None:
    first = VectorQuantizer(32, 4, VQConfig(update=update))
    batches = [torch.randn(1, 4, 4, 4) for _ in range(4)]
    for batch in batches[:2]:
        first(batch)
    second = VectorQuantizer(32, 4, VQConfig(update=update))
    second(torch.randn(1, 4, 4, 4))  # what it held before is gone
    second.load_state_dict(state(first))
    for quantizer in (first, second):
        torch.manual_seed(5)
        for batch in batches[2:]:
            quantizer(batch)
    assert_same_state(state(first), state(second))


def test_a_state_from_before_the_first_batch_is_initialized_by_the_next() -> None:
    quantizer = VectorQuantizer(16, 4, VQConfig())
    untrained = state(quantizer)
    for _ in range(2):
        quantizer(torch.randn(1, 4, 8, 8))
    quantizer.load_state_dict(untrained)
    assert not quantizer.initialized
    quantizer(torch.randn(1, 4, 8, 8))
    assert quantizer.initialized
    assert float(quantizer.share.sum()) == pytest.approx(1, abs=0.1)


def test_the_first_batch_places_every_code_among_the_latents() -> None:
    centers = directions(64, 8)
    vectors = F.normalize(centers.repeat(30, 1) + 0.03 * torch.randn(64 * 30, 8), dim=1)
    quantizer = VectorQuantizer(64, 8, VQConfig())
    error_before = float(quantizer.eval()(as_grid(vectors)).terms["commitment"])
    result = quantizer.train()(as_grid(vectors))
    assert len(result.codes.unique()) >= 62
    assert float(result.terms["commitment"]) < 0.1 * error_before


def test_rounds_of_k_means_improve_on_random_latents() -> None:
    latents = as_grid(directions(3000, 4))
    errors = [float(VectorQuantizer(64, 4, VQConfig(kmeans_rounds=n))(latents).terms["commitment"]) for n in (0, 5, 20)]
    assert errors[2] < errors[1] < errors[0]


def test_a_codebook_larger_than_the_batch_fills_over_the_first_batches() -> None:
    quantizer = VectorQuantizer(256, 4, VQConfig())
    used = [len(quantizer(as_grid(directions(100, 4, seed=step))).codes.unique()) for step in range(4)]
    assert used[0] == 100
    assert int((quantizer.share > 0).sum()) == 256
    quantizer.eval()
    assert len(quantizer(as_grid(directions(20_000, 4, seed=9))).codes.unique()) > 250


@pytest.mark.parametrize("update", UPDATES)
def test_a_collapsed_codebook_revives(update: Literal["ema", "gradient"]) -> None:
    collapsed = F.normalize(torch.tensor([1.0, 0, 0, 0]) + 0.01 * directions(32, 4), dim=1)
    used = {}
    for dead_below in (0.0, 0.1):
        quantizer = quantizer_of(collapsed, update=update, dead_below=dead_below, decay=0.9).train()
        for step in range(60):
            codes = quantizer(as_grid(directions(48, 4, seed=step))).codes
        codes = quantizer.eval()(as_grid(directions(2000, 4, seed=99))).codes
        used[dead_below] = len(codes.unique())
    assert used[0.1] == 32
    assert used[0.0] < 32


def test_a_code_restarts_at_a_latent_of_the_batch_and_is_given_time() -> None:
    codebook = directions(8, 4)
    quantizer = quantizer_of(codebook, decay=0.5, dead_below=0.5).train()
    with torch.no_grad():
        quantizer.running[3] = 0.0
        quantizer.codebook[3] = -codebook[0]
    vectors = F.normalize(codebook[[0, 1, 2, 4, 5, 6, 7]].repeat(4, 1) + 0.2 * directions(28, 4, seed=1), dim=1)
    quantizer(as_grid(vectors))
    reborn = quantizer.codebook[3].clone()
    assert (vectors - reborn).abs().sum(dim=1).min() < 1e-6
    assert float(quantizer.share[3]) > 0.5 / 8
    quantizer(as_grid(codebook[[0, 1, 2, 4]]))  # nobody chooses it, and it is not dead yet
    assert torch.equal(quantizer.codebook[3], reborn)


def test_codes_restart_where_latents_are_badly_served_and_no_two_at_one_latent() -> None:
    background = F.normalize(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), dim=1)
    codebook = torch.cat([background, -directions(5, 4).abs()])
    rare = torch.eye(4)[1:]
    quantizer = quantizer_of(codebook, update="gradient").train()  # so that nothing but restarts moves a code
    quantizer.running[1:] = 0.0
    quantizer(as_grid(torch.cat([background.expand(97, 4), rare])))
    moved = (quantizer.codebook != codebook).any(dim=1)
    assert moved.tolist() == [False, True, True, True, False, False]  # two find no latent to spare and wait
    reborn = quantizer.codebook[1:4].detach()
    assert sorted(reborn.argmax(dim=1).tolist()) == [1, 2, 3]
    torch.testing.assert_close(reborn.max(dim=1).values, torch.ones(3))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_leave_the_state_untouched(
    update: Literal["ema", "gradient"], value: float
) -> None:
    quantizer = VectorQuantizer(32, 4, VQConfig(update=update))
    broken = torch.randn(2, 4, 4, 4)
    broken[1, 2, 3, 0] = value
    for _ in range(2):  # before the first batch and after it
        before = state(quantizer)
        codes = quantizer(broken).codes
        assert_same_state(state(quantizer), before)
        assert 0 <= int(codes.min()) <= int(codes.max()) < 32
        quantizer(torch.randn(2, 4, 4, 4))
        assert bool(quantizer.initialized)
        assert not torch.equal(quantizer.running, before["running"])


def test_latents_without_a_direction_never_become_codes() -> None:
    quantizer = VectorQuantizer(16, 4, VQConfig())
    for _ in range(3):
        latents = torch.randn(1, 4, 2, 8)
        latents[..., ::2] = 0.0
        quantizer(latents)
        torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))


def test_the_backward_pass_survives_a_restart_in_the_same_step() -> None:
    quantizer = VectorQuantizer(64, 4, VQConfig(update="gradient"))
    for _ in range(3):
        before = quantizer.codebook.detach().clone()
        result = quantizer(torch.randn(1, 4, 4, 4))
        assert not torch.equal(quantizer.codebook, before)
        sum(result.terms.values(), start=torch.zeros(())).backward()
    assert quantizer.codebook.grad is not None


def test_the_same_seed_makes_the_same_codebook() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        quantizer = VectorQuantizer(64, 4, VQConfig())
        for step in range(3):
            quantizer(as_grid(directions(48, 4, seed=step)))
        states.append(state(quantizer))
    assert_same_state(states[0], states[1])


TRAINING = """
import sys, torch
from torch import distributed
from dvae.quantizers.vq import VectorQuantizer, VQConfig

def train(update, rank, world):
    torch.manual_seed(rank)  # what rank 0 draws is what counts
    quantizer = VectorQuantizer(64, 4, VQConfig(update=update, decay=0.8, dead_below=0.5, kmeans_rounds=3))
    for step in range(8):
        latents = torch.randn(4, 4, 3, 4, generator=torch.Generator().manual_seed(step))
        if step in (0, 5):
            latents[3, 0, 0, 0] = torch.nan  # one rank's share alone is broken
        quantizer(latents.chunk(world)[rank])
    return {name: value.detach() for name, value in quantizer.state_dict().items()}
"""
RANK = """
folder, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.save([train(update, rank, 2) for update in ("ema", "gradient")], f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_ranks_with_half_the_batch_each_end_like_one_with_all_of_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING + RANK, str(tmp_path), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    namespace: dict[str, Any] = {}
    exec(TRAINING, namespace)
    ends = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for place, update in enumerate(UPDATES):
        alone = namespace["train"](update, 0, 1)
        assert_same_state(ends[0][place], ends[1][place])
        assert_same_state(ends[0][place], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "decay and dead_below must lie in .* got 1.0 and 0.1"),
        ({"dead_below": -0.1}, "got 0.99 and -0.1"),
        ({"kmeans_rounds": -1}, "must not be negative; got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VQConfig(**settings)


@pytest.mark.parametrize(("codebook_size", "embedding_dim"), [(1, 8), (16, 1)])
def test_a_sphere_of_no_choice_is_refused(codebook_size: int, embedding_dim: int) -> None:
    with pytest.raises(ValueError, match=f"got {codebook_size} of {embedding_dim}"):
        VectorQuantizer(codebook_size, embedding_dim, VQConfig())

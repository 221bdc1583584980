"""What training a prior takes, as counted: against the model itself, PyTorch's counter, and tensors that are kept."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recipes.estimate_dvae import kept_bytes
from recipes.estimate_prior import (
    GIB,
    ParallelTraining,
    cache_bytes,
    count_parameters,
    most_samples,
    step_operations,
    training_memory,
    training_memory_gib,
)
from tessera.config import load
from tessera.precision import PrecisionName, autocast, resolve_precision
from tessera.training.optim import OptimizerConfig, build_optimizer
from transformer.lit import prior_loss
from transformer.model import Prior, PriorConfig, SequenceLayout
from transformer.train import TrainConfig

LAYOUT = SequenceLayout(text_len=8, grid_height=4, grid_width=6, text_vocab_size=40, codebook_size=60)
CONFIG = PriorConfig(layout=LAYOUT, dim=64, depth=3, heads=2)
LONG = replace(CONFIG, layout=replace(LAYOUT, grid_height=24, grid_width=24))  # more keys than are multiplied densely
OPTIM = OptimizerConfig()
CPU = ParallelTraining(kind="cpu", precision="fp32")


def loss_of(model: Prior, samples: int, precision: PrecisionName = "fp32") -> torch.Tensor:
    layout = model.layout
    text_ids = torch.zeros(samples, layout.text_len, dtype=torch.int64)
    codes = torch.zeros(samples, layout.image_len, dtype=torch.int64)
    with autocast(resolve_precision(precision, "cpu"), "cpu"):
        output = model(text_ids, codes)
    return prior_loss(output, text_ids, codes, text_vocab_size=layout.text_vocab_size).total


def test_all_parameters_are_counted_once() -> None:
    model = Prior(CONFIG)
    counted = count_parameters(CONFIG)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    assert counted.heads == 64 * (60 + 48)
    assert counted.embeddings == counted.heads + 64 * (4 + 6)


@pytest.mark.parametrize("file", ["5m", "50m", "350m", "1300m"])
def test_the_recipes_have_as_many_parameters_as_their_names_say(file: str) -> None:
    config = load(TrainConfig, [f"configs/prior/{file}.yaml"], prog="tessera")
    assert count_parameters(config.model).total == pytest.approx(1e6 * int(file[:-1]), rel=0.1)


def test_operations_are_those_that_pytorch_counts() -> None:
    config = replace(CONFIG, attention=("row", "full"))
    model = Prior(config, attention_backend="matmul")
    with FlopCounterMode(display=False) as counter:
        loss_of(model, 5).backward()
    counted = step_operations(config, 5, optim=OPTIM)
    positions = LAYOUT.seq_len - 1
    dense = 12 * 5 * 64 * config.depth * positions**2  # PyTorch's counter does not see the masks
    assert counted.blocks + counted.heads + dense == counter.get_total_flops()
    assert counted.attention < 0.6 * dense, "masks spare more than half"


def test_recomputing_and_updates_are_counted_apart() -> None:
    plain = step_operations(CONFIG, 4, optim=OPTIM)
    recomputing = step_operations(CONFIG, 8, optim=OPTIM, checkpoint_activations=True)
    assert (plain.recomputed, recomputing.model) == (0, 2 * plain.model)
    assert recomputing.recomputed == pytest.approx((recomputing.blocks + recomputing.attention) / 3)
    assert recomputing.update == plain.update > 0
    assert step_operations(CONFIG, 4, optim=OptimizerConfig(hidden="adamw")).update == 0


def test_processes_share_the_samples_and_repeat_the_update() -> None:
    operations = step_operations(CONFIG, 64, optim=OPTIM)
    alone, shared = operations.seconds(1e9), operations.seconds(1e9, processes=4)
    assert shared == pytest.approx((alone - operations.update / 1e9) / 4 + operations.update / 1e9)


@pytest.mark.parametrize("precision", get_args(PrecisionName))
@pytest.mark.parametrize("key_value_heads", [0, 1])
@pytest.mark.parametrize("config", [CONFIG, LONG], ids=["written out", "fused"])
def test_activations_are_those_that_a_step_keeps(
    config: PriorConfig, key_value_heads: int, precision: PrecisionName
) -> None:
    def measured(depth: int, samples: int) -> int:
        model = Prior(replace(config, depth=depth, key_value_heads=key_value_heads))
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return kept_bytes(lambda: loss_of(model, samples, precision), weights)

    def counted(depth: int, samples: int) -> float:
        sizes = replace(config, depth=depth, key_value_heads=key_value_heads)
        training = ParallelTraining(kind="cpu", precision=precision)
        return training_memory(sizes, samples, optim=OPTIM, training=training).activations

    def of_a_block(bytes_of: Any) -> float:
        return bytes_of(2, 3) - bytes_of(1, 3) - (bytes_of(2, 1) - bytes_of(1, 1))

    assert of_a_block(counted) == pytest.approx(of_a_block(measured), rel=0.03)


def test_state_is_what_the_optimizer_holds() -> None:
    model = Prior(CONFIG)
    optimizer = build_optimizer(model, OPTIM)
    loss_of(model, 1).backward()
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    memory = training_memory(CONFIG, 1, optim=OPTIM, training=CPU)
    assert (memory.optimizer, memory.weights, memory.gradients, memory.average) == (held, weights, weights, weights)
    without = training_memory(CONFIG, 1, optim=OptimizerConfig(ema_horizon=0.0), training=CPU)
    assert (without.average, without.gathered) == (0, 0)


def test_checkpoints_keep_the_input_of_each_block() -> None:
    def of_three_blocks(config: PriorConfig) -> float:
        training = ParallelTraining(kind="cpu", precision="fp32", checkpoint_activations=True)
        one, four = (
            training_memory(replace(config, depth=depth), 7, optim=OPTIM, training=training).activations
            for depth in (1, 4)
        )
        return four - one

    assert of_three_blocks(CONFIG) == 3 * 7 * (LAYOUT.seq_len - 1) * 64 * 4


def test_fsdp_shares_out_weights_and_gathers_a_few() -> None:
    alone = training_memory(CONFIG, 4, optim=OPTIM, training=CPU)
    ddp = training_memory(CONFIG, 4, optim=OPTIM, training=CPU._replace(processes=4))
    fsdp = training_memory(CONFIG, 4, optim=OPTIM, training=CPU._replace(processes=4, strategy="fsdp"))
    assert ddp == alone
    assert fsdp.weights == alone.weights / 4
    assert fsdp.optimizer == alone.optimizer / 4
    assert 0 < fsdp.gathered < alone.weights
    assert fsdp.activations == alone.activations
    assert training_memory(CONFIG, 4, optim=OPTIM, training=CPU._replace(strategy="fsdp")) == alone


def test_as_many_samples_are_found_as_fit() -> None:
    needed = training_memory(CONFIG, 6, optim=OPTIM, training=CPU).held_gib("cpu")
    found = [
        most_samples(CONFIG, optim=OPTIM, training=CPU, memory_gib=memory_gib, most=100)
        for memory_gib in (0.0, 0.999 * needed, 1.001 * needed, 1e6)
    ]
    assert found == [0, 5, 6, 100]


def test_one_number_serves_a_plan() -> None:
    training = ParallelTraining(kind="cuda", precision="bf16", checkpoint_activations=True)
    memory = training_memory(CONFIG, 9, optim=OPTIM, training=training)
    found = training_memory_gib(CONFIG, 9, checkpoint_activations=True)
    assert found == memory.held_gib("cuda") > memory.peak / GIB
    assert training_memory_gib(CONFIG, 18, kind="cpu") > training_memory_gib(CONFIG, 9, kind="cpu")
    assert training_memory_gib(replace(CONFIG, key_value_heads=1), 9) < training_memory_gib(CONFIG, 9)


def test_the_cache_of_an_image_is_the_models_own() -> None:
    assert cache_bytes(CONFIG, "fp32") == Prior(CONFIG).new_cache(1).num_bytes == 2 * cache_bytes(CONFIG, "bf16")


def test_counting_needs_no_memory_for_weights() -> None:
    huge = PriorConfig(layout=LAYOUT, dim=65536, depth=2, heads=512)  # 400 GiB
    assert training_memory_gib(huge, 1) > 400

"""Block sizes are found for every supported launch, without a GPU, and fit the GPU that they are for."""

from typing import get_args

import pytest
import torch

from transformer.kernels.launch_config import (
    HEAD_DIMS,
    Format,
    KernelName,
    candidates,
    decode_splits,
    launch_config,
    number_format,
    padded_head_dim,
    text_parts,
)

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("kernel", get_args(KernelName))
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("name", get_args(Format))
def test_every_supported_launch_has_a_config(kernel: KernelName, capability: tuple[int, int], name: Format) -> None:
    for head_dim in range(HEAD_DIMS[0], HEAD_DIMS[1] + 1, 8):
        for text_len in (0, 64, 257):
            config = launch_config(
                kernel, head_dim=head_dim, number_format=name, capability=capability, text_len=text_len
            )
            for block in (config.block_q, config.block_k):
                assert block >= 16 and block & (block - 1) == 0, "matrix products need powers of two from 16 on"
            assert config.num_warps in (4, 8)


def test_long_text_takes_larger_tiles_of_queries_on_a_large_gpu() -> None:
    sizes = [
        launch_config("forward", head_dim=64, number_format="half", capability=(9, 0), text_len=text_len).block_q
        for text_len in (64, 65)
    ]
    assert sizes == [64, 128]


def test_grouped_queries_take_smaller_blocks_for_the_gradients_of_keys() -> None:
    blocks = [
        launch_config(
            "key_value_gradient", head_dim=64, number_format="half", capability=(9, 0), text_len=64, group=group
        ).block_q
        for group in (1, 2)
    ]
    assert blocks == [64, 32]


def test_the_shipped_config_is_among_the_candidates() -> None:
    for kernel in get_args(KernelName):
        for head_dim in (32, 64, 128):
            for capability in ((8, 0), (9, 0)):
                shipped = launch_config(
                    kernel, head_dim=head_dim, number_format="half", capability=capability, text_len=256
                )
                listed = candidates(kernel, head_dim=head_dim, capability=capability)
                assert shipped in listed or shipped == (64, 64, 8, 2)  # kept for spilling less, not for speed
                assert len(set(listed)) == len(listed)


def test_float32_is_exact_unless_pytorch_is_told_otherwise() -> None:
    assert number_format(torch.bfloat16) == number_format(torch.float16) == "half"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert number_format(torch.float32) == "float32"
        torch.set_float32_matmul_precision("high")
        assert number_format(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_head_widths_are_padded_to_powers_of_two() -> None:
    assert [padded_head_dim(width) for width in (32, 40, 64, 96, 128)] == [32, 64, 64, 128, 128]


def test_text_tiles_are_split_only_where_programs_are_few() -> None:
    split = [text_parts(count, text_len=256, block_k=64, processors=132) for count in (1, 16, 32, 64, 512)]
    assert split == [8, 5, 3, 2, 1]
    assert text_parts(4, text_len=0, block_k=64, processors=132) == 1


def test_decoding_splits_keys_until_every_processor_has_a_program() -> None:
    assert decode_splits(512, blocks=7, processors=132) == 1
    assert decode_splits(32, blocks=7, processors=132) == 4, "five parts of two blocks would leave one with nothing"
    assert decode_splits(2, blocks=7, processors=132) == 7, "never more parts than blocks"

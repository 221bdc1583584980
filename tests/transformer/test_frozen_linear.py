"""A frozen weight gives x W^T, the same for a row whatever rows are beside it, and no longer follows its source."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from transformer import frozen_linear
from transformer.frozen_linear import KERNEL_ROWS, FrozenLinear, Storage, quantize

# R rows, K input channels, N output channels.

TOLERANCE: dict[Storage, float] = {"fp32": 1e-5, "bf16": 2e-2, "int8": 3e-2}
# one part, several, several with a rest, and numbers that fill no vector
SHAPES = [(24, 16), (65, 200), (40, 1024), (33, 4096), (96, 2752), (31, 3), (48, 88)]  # N, K

every_storage = pytest.mark.parametrize("storage", get_args(Storage))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def random_weight(shape: tuple[int, int]) -> Tensor:
    """Of products of the size of their inputs."""
    return torch.randn(shape) * shape[1] ** -0.5


def check_rows(matrix: FrozenLinear, x: Tensor) -> None:
    """Every number of rows gives each row what it gives alone, bit for bit, wherever it stands."""
    alone = torch.cat([matrix(row) for row in x.split(1)])
    for rows in range(1, len(x) + 1):
        assert torch.equal(matrix(x[:rows]), alone[:rows]), f"{rows} rows"
    order = torch.randperm(len(x))
    assert torch.equal(matrix(x[order]), alone[order])


@every_storage
@every_shape
@pytest.mark.parametrize("rows", [1, 11])
def test_the_product_is_that_of_the_weight(storage: Storage, shape: tuple[int, int], rows: int) -> None:
    weight, x = random_weight(shape), torch.randn(rows, shape[1])
    product = FrozenLinear(weight, storage=storage)(x)
    assert product.shape == (rows, shape[0]) and product.dtype == torch.float32
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(product, expected, atol=TOLERANCE[storage], rtol=TOLERANCE[storage])


@every_storage
@every_shape
def test_a_row_does_not_depend_on_the_rows_beside_it(storage: Storage, shape: tuple[int, int]) -> None:
    check_rows(FrozenLinear(random_weight(shape), storage=storage), torch.randn(40, shape[1]))


@every_storage
@pytest.mark.parametrize("way", ["at once", "in parts", "in tiles"])
def test_every_way_gives_the_product(storage: Storage, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_linear, "_way_for", lambda *shape: way)
    weight, x = random_weight((40, 2752)), torch.randn(19, 2752)
    product = FrozenLinear(weight, storage=storage)(x)
    torch.testing.assert_close(product, x @ weight.T, atol=TOLERANCE[storage], rtol=TOLERANCE[storage])


@every_storage
@pytest.mark.parametrize("shape", [(65, 200), (96, 2752)], ids=["200", "2752"])
def test_in_tiles_neither_the_number_of_rows_nor_the_place_in_the_tile_matters(
    storage: Storage, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_linear, "_way_for", lambda *shape: "in tiles")
    matrix, x = FrozenLinear(random_weight(shape), storage=storage), torch.randn(19, shape[1])
    check_rows(matrix, x)
    for place in range(frozen_linear.TILE_ROWS):
        assert torch.equal(matrix(x.roll(place, dims=0)).roll(-place, dims=0), matrix(x))


@pytest.mark.parametrize(
    ("faulty", "storage", "channels", "expected"),
    [
        ((), "fp32", 2048, "at once"),
        (("at once",), "fp32", 2048, "in parts"),
        (("at once", "in parts"), "fp32", 2048, "in tiles"),
        (("at once",), "fp32", 512, "in tiles"),  # parts would be the whole
        (("at once",), "int8", 2048, "in tiles"),
    ],
)
def test_the_widest_way_is_taken_whose_rows_do_not_depend_on_each_other(
    faulty: tuple[str, ...], storage: Storage, channels: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among ways of which some round otherwise from 14 rows on."""

    def made_up(weight: Tensor, storage: Storage, way: str) -> frozen_linear._Multiply:
        return lambda x: x[:, : len(weight)] * (1 + (len(x) > 13) * (way in faulty) * 1e-6)

    monkeypatch.setattr(frozen_linear, "_on_cpu", made_up)
    assert frozen_linear._way_for.__wrapped__(8, channels, storage, 1) == expected


def test_another_number_of_threads_asks_for_another_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(out_channels: int, channels: int, storage: Storage, num_threads: int) -> str:
        asked.append((out_channels, channels, storage, num_threads))
        return "at once"

    monkeypatch.setattr(frozen_linear, "_way_for", recorded)
    for num_threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
        FrozenLinear(random_weight((24, 16)), storage="bf16")
    assert asked == [(24, 16, "bf16", 1), (24, 16, "bf16", 3)]


@every_storage
@pytest.mark.parametrize("has_onednn", [True, False])
def test_later_changes_of_the_weight_are_not_seen(
    storage: Storage, has_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_onednn)
    frozen_linear._way_for.cache_clear()
    weight, x = random_weight((65, 1500)), torch.randn(3, 1500)
    matrix = FrozenLinear(weight, storage=storage)
    before = matrix(x)
    torch.testing.assert_close(before, x @ weight.T, atol=TOLERANCE[storage], rtol=TOLERANCE[storage])
    weight.zero_()
    assert torch.equal(matrix(x), before)
    frozen_linear._way_for.cache_clear()


@every_storage
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_has_the_dtype_of_what_is_multiplied(storage: Storage, dtype: torch.dtype) -> None:
    weight, x = random_weight((24, 16)), torch.randn(3, 16).to(dtype)
    product = FrozenLinear(weight.to(dtype), storage=storage)(x)
    assert product.dtype == dtype
    torch.testing.assert_close(product.float(), x.float() @ weight.T, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(("storage", "num_bytes"), [("fp32", 4 * 65 * 200), ("bf16", 2 * 65 * 200), ("int8", 65 * 200)])
def test_num_bytes_is_what_the_storage_takes(storage: Storage, num_bytes: int) -> None:
    assert FrozenLinear(random_weight((65, 200)), storage=storage).num_bytes == num_bytes


def test_quantized_weights_are_within_half_a_step() -> None:
    weight = torch.randn(50, 300) * torch.logspace(-6, 6, 50)[:, None]
    weight[7] = 0
    weight[8, 1:] = 0
    quantized, scale = quantize(weight)
    assert quantized.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (50,)
    largest = quantized.abs().amax(dim=1)
    assert not quantized[7].any() and (largest[torch.arange(50) != 7] == 127).all()
    assert quantized.min() >= -127
    error = (quantized.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= scale.double()[:, None] / 2 * (1 + 1e-4)).all()
    assert float(error[8].max()) <= float(weight[8, 0].abs()) * 1e-6


@pytest.mark.parametrize(
    ("weight", "storage", "message"),
    [
        (torch.zeros(3, 4), "int4", r"storage is one of fp32, bf16, int8; got 'int4'"),
        (torch.zeros(3), "fp32", r"must be float \[N, K\]; got torch.float32 \[3\]"),
        (torch.zeros(3, 4, dtype=torch.int8), "int8", r"must be float \[N, K\]; got torch.int8 \[3, 4\]"),
    ],
)
def test_what_cannot_be_stored_is_refused(weight: Tensor, storage: Storage, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenLinear(weight, storage=storage)


class TestElsewhere:
    """What devices other than CPUs do, on a CPU."""

    @every_storage
    def test_the_product_is_that_of_the_weight(self, storage: Storage) -> None:
        weight, x = random_weight((65, 200)), torch.randn(5, 200)
        product = frozen_linear._elsewhere(weight, storage)(x)
        torch.testing.assert_close(product, x @ weight.T, atol=TOLERANCE[storage], rtol=TOLERANCE[storage])

    def test_few_rows_take_the_kernel_where_it_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        taken = []
        of_kernel = frozen_linear.ops.int8_linear

        def recorded(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            taken.append(len(x))
            return of_kernel(x, weight, scale)

        monkeypatch.setattr(frozen_linear.ops, "int8_linear", recorded)
        weight, x = random_weight((24, 200)), torch.randn(KERNEL_ROWS + 1, 200)
        rows = (1, KERNEL_ROWS, KERNEL_ROWS + 1)
        for has_kernel, expected in ((False, []), (True, [1, KERNEL_ROWS])):
            monkeypatch.setattr(frozen_linear, "_has_kernel", lambda device, has_kernel=has_kernel: has_kernel)
            multiply = frozen_linear._elsewhere(weight, "int8")
            for count in rows:
                torch.testing.assert_close(multiply(x[:count]), x[:count] @ weight.T, atol=3e-2, rtol=3e-2)
            assert taken == expected

    @pytest.mark.parametrize(
        ("device", "capability", "hip", "is_installed", "expected"),
        [
            ("cuda", (9, 0), None, True, True),
            ("cuda", (8, 0), None, True, True),
            ("cuda", (7, 5), None, True, False),
            ("cuda", (9, 0), "6.4", True, False),
            ("cuda", (9, 0), None, False, False),
            ("cpu", (9, 0), None, True, False),
            ("mps", (9, 0), None, True, False),
        ],
    )
    def test_the_kernel_needs_an_nvidia_gpu_that_it_is_made_for(
        self,
        device: str,
        capability: tuple[int, int],
        hip: str | None,
        is_installed: bool,
        expected: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        found = object() if is_installed else None
        monkeypatch.setattr(frozen_linear.importlib.util, "find_spec", lambda name: found)
        assert frozen_linear._has_kernel(torch.device(device)) == expected

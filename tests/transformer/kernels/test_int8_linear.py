"""The product with an int8 weight: as a kernel under Triton's interpreter and compiled, and as an operator."""

import os
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from transformer.kernels import int8_reference, ops

pytest.importorskip("triton")

from transformer.kernels import int8_linear

# R rows, K input channels, N output channels.

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")


def random_inputs(
    rows: int, inputs: int, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Of products of the size of their inputs; the weight's extremes included."""
    weight = torch.randint(-127, 128, (channels, inputs), dtype=torch.int8)
    weight[0], weight[-1] = 127, -127
    scale = (torch.rand(channels) + 0.5) / 73 * inputs**-0.5
    return torch.randn(rows, inputs).to(dtype), weight, scale


class TestReference:
    """What defines the operator."""

    def test_it_is_the_product_with_the_scaled_weight(self) -> None:
        x, weight, scale = random_inputs(3, 20, 7, torch.float64)
        expected = torch.zeros(3, 7, dtype=torch.float64)
        for row, channel in product(range(3), range(7)):
            terms = zip(x[row].tolist(), weight[channel].tolist(), strict=True)
            expected[row, channel] = sum(one * other for one, other in terms) * float(scale[channel])
        torch.testing.assert_close(int8_reference.int8_linear(x, weight, scale), expected)


@pytest.mark.interpreter
class TestKernel:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize(
        ("rows", "inputs", "channels"),
        # one row; blocks that are full; those that are not, in each direction; fewer inputs than one warp takes
        [(1, 256, 16), (8, 512, 32), (9, 100, 33), (16, 300, 7), (33, 513, 16), (2, 2752, 17), (3, 5, 1)],
    )
    def test_it_equals_the_reference(self, rows: int, inputs: int, channels: int, dtype: torch.dtype) -> None:
        x, weight, scale = random_inputs(rows, inputs, channels, dtype)
        output = ops.int8_linear(x, weight, scale)
        assert output.dtype == dtype and output.shape == (rows, channels)
        exact = int8_reference.int8_linear(x.double(), weight, scale)
        error = (output.double() - exact).abs().max() / exact.abs().max().clamp_min(1)
        assert error <= TOLERANCE[dtype]

    def test_what_lies_beside_the_tensors_is_neither_read_nor_written(self) -> None:
        x, weight, scale = random_inputs(3, 50, 10)
        wide = torch.full((4, 80), torch.nan)
        wide[:3, :50] = x
        output = int8_linear.int8_linear(wide[:3, :50], weight, scale)
        torch.testing.assert_close(output, int8_reference.int8_linear(x, weight, scale))

    def test_columns_that_are_not_contiguous_are_copied(self) -> None:
        x, weight, scale = random_inputs(3, 50, 10)
        output = ops.int8_linear(x.T.contiguous().T, weight, scale)
        torch.testing.assert_close(output, int8_reference.int8_linear(x, weight, scale))

    @pytest.mark.parametrize(("rows", "channels"), [(0, 4), (4, 0)])
    def test_nothing_is_legal(self, rows: int, channels: int) -> None:
        output = ops.int8_linear(
            torch.randn(rows, 8), torch.zeros(channels, 8, dtype=torch.int8), torch.zeros(channels)
        )
        assert output.shape == (rows, channels)


@compiled
class TestOperator:
    @pytest.fixture(autouse=True)
    def _without_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_opcheck_passes(self, dtype: torch.dtype) -> None:
        torch.library.opcheck(
            torch.ops.tessera.int8_linear.default,
            random_inputs(3, 20, 7, dtype),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )

    def test_a_cpu_computes_by_the_reference(self) -> None:
        inputs = random_inputs(3, 20, 7)
        assert torch.equal(ops.int8_linear(*inputs), int8_reference.int8_linear(*inputs))

    def test_the_compiler_holds_it_in_one_graph(self) -> None:
        x, weight, scale = random_inputs(3, 20, 7)

        def doubled(x: Tensor) -> Tensor:
            return ops.int8_linear(x * 2, weight, scale)

        torch._dynamo.reset()
        again = torch.compile(doubled, backend="aot_eager", fullgraph=True)
        with torch.inference_mode():
            torch.testing.assert_close(again(x), doubled(x))

    def test_a_gpu_that_is_not_there_is_told_the_shape(self) -> None:
        with FakeTensorMode():
            x = torch.empty(3, 20, device="cuda", dtype=torch.bfloat16)
            weight = torch.empty(7, 20, device="cuda", dtype=torch.int8)
            output = ops.int8_linear(x, weight, torch.empty(7, device="cuda"))
            assert (output.shape, output.dtype, output.device.type) == ((3, 7), torch.bfloat16, "cuda")
            assert output.stride() == (7, 1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(2, 3, 20)}, r"got \[2, 3, 20\], \[7, 20\] and \[7\]"),
            ({"x": torch.zeros(3, 19)}, r"x \[R, K\], weight \[N, K\] and scale \[N\]; got \[3, 19\], \[7, 20\]"),
            ({"scale": torch.zeros(7, 1)}, r"and \[7, 1\]"),
            ({"scale": torch.zeros(20)}, r"and \[20\]"),
            ({"weight": torch.zeros(7, 20)}, "got torch.float32, torch.float32 and torch.float32"),
            ({"x": torch.zeros(3, 20, dtype=torch.int8)}, "needs floating x, .* got torch.int8"),
            ({"scale": torch.zeros(7, dtype=torch.bfloat16)}, "and torch.bfloat16"),
            ({"weight": torch.zeros(20, 7, dtype=torch.int8).T}, r"contiguous weight and scale; got strides \(1, 7\)"),
            ({"scale": torch.zeros(14)[::2]}, r"got strides \(20, 1\) and \(2,\)"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, change: dict[str, Tensor], message: str) -> None:
        x, weight, scale = random_inputs(3, 20, 7)
        with pytest.raises(ValueError, match=message):
            ops.int8_linear(**{"x": x, "weight": weight, "scale": scale} | change)


@compiled
class TestAheadOfTime:
    def test_few_and_many_rows_are_shipped_in_every_format_for_every_gpu(self) -> None:
        from transformer.kernels.ahead_of_time import shipped_linear

        builds = shipped_linear()
        assert len(set(builds)) == len(builds) == 2 * 3 * 2
        shipped = {int8_linear.block_rows(build.rows) for build in builds}
        assert shipped == {int8_linear.block_rows(rows) for rows in range(1, 65)}

    @pytest.mark.slow
    def test_every_shipped_form_compiles_without_spills_for_every_gpu(self) -> None:
        from transformer.kernels.ahead_of_time import compile_linear_build, problems, shipped_linear

        for build in shipped_linear():
            assert problems(build, compile_linear_build(build)) == [], build

    def test_the_form_for_one_row_on_hopper_widens_in_registers_and_multiplies_on_matrix_units(self) -> None:
        from transformer.kernels.ahead_of_time import LinearBuild, compile_linear_build, problems

        build = LinearBuild(rows=1, number_format="half", capability=(9, 0))
        found = compile_linear_build(build)
        assert problems(build, found) == []
        assert found.registers <= 64  # then eight programs of four warps share a processor

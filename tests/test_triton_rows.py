"""The Triton row kernels against float64: in Triton's interpreter on CPU, and compiled wherever there is a GPU.

The interpreter must be selected before triton is imported, so the kernels run in a separate process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from tests.gang import Gang
from tests.nursery import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")

SPLITS = {"one_program_a_row": 1, "rows_split_over_programs": 64}


def run_statistics(device, logits, columns, tile, programs):
    """Runs in the kernels' process; with a small tile, small rows span several."""
    from etr_megatron.vocab_parallel import triton_rows

    with mock.patch.multiple(triton_rows, _TILE=tile, _PROGRAMS=programs):
        return triton_rows.row_statistics(on(device, logits), columns.to(device)).cpu()


def run_gradient(device, logits, columns, per_row, out, tile):
    """Runs in the kernels' process. out: "in place" or a dtype."""
    from etr_megatron.vocab_parallel import triton_rows

    logits = on(device, logits)
    out = logits if out == "in place" else torch.full_like(logits, 9.0, dtype=out)
    with mock.patch.multiple(triton_rows, _TILE=tile):
        rows = [None if x is None else x.to(device) for x in per_row]
        found = triton_rows.row_gradient(logits, columns.to(device), *rows, out)
    assert found is out
    return found.cpu()


def run_available(device):
    """Runs in the kernels' process."""
    from etr_megatron.vocab_parallel import triton_rows

    return triton_rows.is_available(torch.device(device))


def run_refused(device, logits):
    """Runs in the kernels' process; returns the message of the ValueError."""
    from etr_megatron.vocab_parallel import triton_rows

    with pytest.raises(ValueError) as error:
        triton_rows.row_statistics(logits.to(device), torch.zeros(len(logits), dtype=torch.int64))
    return str(error.value)


def on(device, logits):
    """The matrix with its strides: `.to(device)` and pickling may both remove the gaps between rows."""
    moved = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=device)
    return moved.copy_(logits)


@pytest.fixture(scope="module", params=["interpreter", "cuda"] if torch.cuda.is_available() else ["interpreter"])
def kernels(request):
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1" if request.param == "interpreter" else "0"}):
        gang = Gang(1)
    device = "cpu" if request.param == "interpreter" else "cuda"
    yield lambda job, **arguments: gang.run(f"tests.test_triton_rows:{job}", device=device, **arguments)[0]
    gang.stop()


def case(rows: int, real: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, gap: int = 0):
    """Logits with row stride real + gap, and targets: outside the shard, the first column, the last one, then any."""
    generator = torch.Generator().manual_seed(rows * 1000 + real)
    logits = (scale * torch.randn(rows, real + gap, generator=generator)).to(dtype)[:, :real]
    columns = torch.randint(-1, real, (rows,), generator=generator)
    columns[: min(rows, 3)] = torch.tensor([-1, 0, real - 1])[:rows]
    return logits, columns


def float64_statistics(logits, columns):
    x = logits.double()
    top = x.max(1).values
    e = (x - top[:, None]).exp()
    product = torch.where(e == 0, 0.0, e * (x - top[:, None]))
    target = torch.tensor([x[row, column] if column >= 0 else 0.0 for row, column in enumerate(columns.tolist())])
    return torch.stack([top, e.sum(1), target.double(), product.sum(1)])


def float64_gradient(logits, columns, g_logp, g_entropy):
    """By autograd through log_softmax; in rows whose target is outside the shard, g_logp only applies to -log-sum-exp."""
    x = logits.double().requires_grad_()
    log_sum = torch.logsumexp(x, 1)
    log_p = x - log_sum[:, None]
    entropy = -(log_p.exp() * log_p).sum(1)
    target = torch.where(columns >= 0, x.gather(1, columns.clamp(min=0)[:, None])[:, 0], 0.0)
    (g_logp * (target - log_sum) + g_entropy * entropy).sum().backward()
    return x.grad, log_sum.detach().float(), entropy.detach().float()


SHAPES = [(4, 16, 0), (5, 7, 4), (1, 37, 0), (3, 1, 2), (6, 50, 0), (1, 1, 0), (5, 33, 5)]
"""(rows, real, gap between rows), for tiles of 16 columns."""


@pytest.mark.parametrize("programs", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize(("rows", "real", "gap"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_statistics_equal_float64(kernels, rows, real, gap, dtype, programs):
    logits, columns = case(rows, real, dtype, gap=gap)
    found = kernels("run_statistics", logits=logits, columns=columns, tile=16, programs=programs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), float64_statistics(logits, columns), rtol=2e-6, atol=2e-6)


def test_statistics_at_the_tile_and_the_split_that_training_uses(kernels):
    logits, columns = case(3, 9001)
    found = kernels("run_statistics", logits=logits, columns=columns, tile=4096, programs=512)
    torch.testing.assert_close(found.double(), float64_statistics(logits, columns), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("programs", SPLITS.values(), ids=SPLITS)
def test_large_logits_keep_their_sums_and_logprobs_are_never_above_zero(kernels, programs):
    logits, columns = case(8, 45, scale=1.0)
    logits *= torch.tensor([1.0, 30.0, 1e4, 1e4, -1e4, 1.0, 1.0, 1.0])[:, None]
    logits[5] += 1e4
    logits[6] -= 1e4
    logits[7] = 1e4
    columns = torch.where(columns < 0, 0, columns)
    columns[:4] = logits[:4].argmax(1)  # certain tokens: rounding could make a log-prob of 0 positive
    found = kernels("run_statistics", logits=logits, columns=columns, tile=16, programs=programs)
    torch.testing.assert_close(found.double(), float64_statistics(logits, columns), rtol=2e-6, atol=2e-6)
    top, total, target, _ = found
    assert (target - (top + total.log()) <= 0).all()


@pytest.mark.parametrize("programs", SPLITS.values(), ids=SPLITS)
def test_a_common_offset_of_the_logits_costs_no_digits(kernels, programs):
    logits, columns = case(6, 45)
    logits[:, 0] -= 20  # so that the maximum grows from tile to tile
    logits[:, 40] += 5
    found = kernels("run_statistics", logits=logits + 1e3, columns=columns, tile=16, programs=programs)
    wanted = float64_statistics(logits + 1e3, columns)
    torch.testing.assert_close(found[[1, 3]].double(), wanted[[1, 3]], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("programs", SPLITS.values(), ids=SPLITS)
def test_columns_of_probability_zero_take_no_part(kernels, programs):
    logits, columns = case(5, 40)
    logits[:, 3:30] = -torch.inf  # all of the second tile of 16
    logits[2, :16] = -torch.inf  # and of the first
    logits[4] = -torch.inf
    columns = torch.tensor([-1, 0, 39, 31, -1])
    found = kernels("run_statistics", logits=logits, columns=columns, tile=16, programs=programs)
    expected = float64_statistics(logits[:4], columns[:4])
    torch.testing.assert_close(found[:, :4].double(), expected, rtol=2e-6, atol=2e-6)
    assert found[:, 4].tolist() == [-torch.inf, 0.0, 0.0, 0.0]  # adds nothing to the statistics of other shards

    upstream = torch.tensor([[0.7, -1.3, 0.4, 2.0], [0.5, 1.1, -0.9, 0.3]])
    masked = logits[:4] == -torch.inf
    clean = torch.where(masked, -1e30, logits[:4])
    wanted, log_sum, entropy = float64_gradient(clean, columns[:4], *upstream.double())
    per_row = (log_sum, entropy, *upstream)
    got = kernels("run_gradient", logits=logits[:4], columns=columns[:4], per_row=per_row, out="in place", tile=16)
    assert (got[masked] == 0).all()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_nan_among_the_logits_stays_visible_in_its_row_alone(kernels):
    logits, columns = case(3, 40)
    logits[1, 20] = torch.nan
    found = kernels("run_statistics", logits=logits, columns=columns, tile=16, programs=1)
    assert found[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("rows", "real", "gap"), SHAPES)
@pytest.mark.parametrize("with_entropy", [True, False], ids=["entropy", "no_entropy"])
@pytest.mark.parametrize("out", ["in place", torch.float32, torch.bfloat16], ids=["in_place", "fp32_out", "bf16_out"])
def test_gradient_equals_float64_autograd(kernels, rows, real, gap, with_entropy, out):
    logits, columns = case(rows, real, gap=gap)
    check_gradient(kernels, logits, columns, with_entropy, out)


def test_gradient_of_bf16_logits_in_place(kernels):
    check_gradient(kernels, *case(5, 37, torch.bfloat16, gap=3), True, "in place")


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_gradient_of_large_logits_is_finite_and_exact(kernels, scale):
    check_gradient(kernels, *case(6, 50, scale=scale), True, "in place")


def check_gradient(kernels, logits, columns, with_entropy, out):
    upstream = torch.randn(2, len(logits), generator=torch.Generator().manual_seed(3))
    g_logp, g_entropy = upstream[0], upstream[1] if with_entropy else torch.zeros_like(upstream[1])
    wanted, log_sum, entropy = float64_gradient(logits, columns, g_logp.double(), g_entropy.double())
    per_row = (log_sum, entropy, g_logp, g_entropy if with_entropy else None)
    found = kernels("run_gradient", logits=logits, columns=columns, per_row=per_row, out=out, tile=16)
    dtype = logits.dtype if out == "in place" else out
    assert found.dtype == dtype and found.isfinite().all()
    # fp32: log p is a difference of numbers of the logits' magnitude, which have a relative precision of 6e-8. bf16: the
    # interpreter truncates where a GPU rounds.
    atol = 1e-5 + 3e-7 * logits.abs().max().item() if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=atol)


def test_no_rows_and_no_columns_are_fine(kernels):
    none = torch.zeros(0, dtype=torch.int64)
    assert kernels("run_statistics", logits=torch.zeros(0, 9), columns=none, tile=16, programs=4).shape == (4, 0)
    found = kernels("run_statistics", logits=torch.zeros(2, 0), columns=torch.tensor([-1, -1]), tile=16, programs=4)
    assert found.tolist() == [[-torch.inf] * 2, [0.0] * 2, [0.0] * 2, [0.0] * 2]


def test_other_layouts_are_refused(kernels):
    assert "adjacent columns, not torch.float32 of shape (4, 9)" in kernels("run_refused", logits=torch.zeros(9, 4).t())
    assert "not torch.float16" in kernels("run_refused", logits=torch.zeros(4, 9, dtype=torch.float16))


def test_available_where_the_kernels_can_run(kernels):
    assert kernels("run_available")


def in_a_new_process(code: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_not_available_on_cpu_without_the_interpreter_nor_without_triton():
    asks = "import torch; from etr_megatron.vocab_parallel import triton_rows as t; print(t.is_available(torch.device('cpu')))"
    assert in_a_new_process(asks) == "False\n"
    assert in_a_new_process(f"import sys; sys.modules['triton'] = None; {asks}") == "False\n"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from etr_megatron.vocab_parallel import triton_rows as t

def compiled(kernel, constants, capability, dtype):
    def kind(name):
        if name in constants:
            return "constexpr"
        if name == "columns":
            return "*i64"
        pointers = {"logits": "*fp32", "out": "*" + dtype}
        counts = ("rows", "real", "span", "splits")
        return pointers.get(name, "i32" if name.endswith("stride") or name in counts else "*fp32")
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["cubin"]

for capability in (80, 90):
    for dtype in ("fp32", "bf16"):
        for entropy in (False, True):
            compiled(t._gradient_kernel, {"HAS_ENTROPY": entropy, "TILE": t._TILE}, capability, dtype)
    compiled(t._statistics_kernel, {"TILE": t._TILE}, capability, "fp32")
    print(capability, len(compiled(t._join_kernel, {"SPLITS": 64}, capability, "fp32")) > 0)
"""


def test_kernels_compile_to_machine_code_of_ampere_and_hopper():
    """Needs no GPU: triton includes its assembler. The code is not run here."""
    assert in_a_new_process(COMPILE) == "80 True\n90 True\n"

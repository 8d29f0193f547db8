"""The head on the device, its row passes in torch and in Triton, against float64 on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from etr_megatron.vocab_parallel import VocabShard, triton_rows, vocab_parallel_logprob, vocab_parallel_loss
from tests.gpu.conftest import DEVICE
from tests.vocab_cases import Case, loss_case

BF16 = 1e-2 if DEVICE.type == "cuda" else 0.15
"""On CPU the head rounds its products to bf16, large logits among them."""

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, BF16)], ids=["fp32", "bf16"])
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
WAYS = pytest.mark.parametrize("single_pass", [True, False], ids=["single_pass", "recompute"])


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 has 10 mantissa bits; without it, fp32 stays within 2e-5."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def bounded_case(rows: int, hidden: int, vocab: int, dtype: torch.dtype = torch.float32) -> Case:
    """Ratios far beyond and well within the bounds, so that rounding never decides whether a row is clipped."""
    case = loss_case(rows, hidden, vocab, dtype=dtype)
    return replace(case, old_logp=case.answer()["logp"].float() - log_ratios(rows))


def log_ratios(rows: int) -> torch.Tensor:
    return torch.tensor([-0.8, -0.05, 0.05, 0.8])[torch.arange(rows) % 4]


def on_device(case: Case, device: torch.device) -> Case:
    return Case(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in vars(case).items()})


def run(case: Case, device: torch.device, backend: str, single_pass: bool, padding: int, already: float) -> dict:
    """Values and gradients. already: initial value of the weight's fp32 buffer, subtracted. padding: extra vocabulary rows."""
    if backend == "triton" and not triton_rows.is_available(device):
        pytest.skip(f"Triton cannot run on {device.type} here")
    case, vocab = on_device(case, device), len(case.weight)
    hidden = case.hidden.clone().requires_grad_()
    weight = torch.nn.functional.pad(case.weight, (0, 0, 0, padding), value=7.0).requires_grad_()
    weight.main_grad = torch.full(weight.shape, already, device=device)
    options = {"shard": VocabShard(len(weight), vocab), "temperature": case.temperature, "chunk_rows": 11, "backend": backend}
    if single_pass:
        loss, logp, entropy = vocab_parallel_loss(hidden, weight, case.targets, case.token_loss, **options)
    else:
        logp, entropy = vocab_parallel_logprob(hidden, weight, case.targets, **options)
        loss = case.token_loss(slice(None), logp, entropy)
    loss.backward()
    assert not (weight.main_grad[vocab:] - already).any()
    grad = weight.main_grad[:vocab] - already
    found = {"loss": loss, "logp": logp, "entropy": entropy, "hidden_grad": hidden.grad, "weight_grad": grad}
    return {name: value.detach().double().cpu() for name, value in found.items()}


@WAYS
@BACKENDS
@DTYPES
@pytest.mark.parametrize(("vocab", "padding"), [(1, 0), (131, 0), (4099, 61), (9001, 0)])
def test_values_and_gradients_equal_float64(device, single_pass, backend, dtype, tolerance, vocab, padding):
    case = bounded_case(35, 72, vocab, dtype)
    found = run(case, device, backend, single_pass, padding, already=0.0)
    for name, wanted in case.answer().items():
        error, size = (found[name] - wanted).norm().item(), wanted.norm().item()
        # With a vocabulary of one token, gradients are 0, and log-probs and loss may nearly be.
        assert error <= tolerance * size + (1e-5 if name.endswith("grad") else tolerance), f"{name}: {error} of {size}"


@WAYS
@BACKENDS
def test_gradients_are_added_to_what_the_buffer_holds(device, single_pass, backend):
    case = bounded_case(35, 72, 1003)
    found = run(case, device, backend, single_pass, 21, already=1.5)
    torch.testing.assert_close(found["weight_grad"], case.answer()["weight_grad"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("single_pass", [True, False], ids=["single_pass", "recompute"])
@BACKENDS
def test_logprobs_of_a_vocabulary_of_151936_are_those_of_float64(device, backend, single_pass):
    case = bounded_case(13, 40, 151_936, torch.bfloat16)
    found, wanted = run(case, device, backend, single_pass, 128, already=0.0), case.answer()
    for name in ("logp", "entropy"):
        assert (found[name] - wanted[name]).norm() < BF16 * wanted[name].norm()
    assert (found["weight_grad"] - wanted["weight_grad"]).norm() < BF16 * wanted["weight_grad"].norm()
    assert (found["logp"] <= 0).all()


@DTYPES
@BACKENDS
def test_a_tied_head_and_its_embedding_share_one_buffer(device, backend, dtype, tolerance):
    """As in Megatron's DDP: the head adds to the buffer in forward, autograd gives the hook only the embedding's part."""
    if backend == "triton" and not triton_rows.is_available(device):
        pytest.skip(f"Triton cannot run on {device.type} here")
    case = bounded_case(35, 72, 1003, dtype)
    tokens = torch.arange(35) * 7 % 1003
    exact = case.weight.double().requires_grad_()
    states = case.hidden.double() + exact[tokens]
    states = states + ((case.hidden + case.weight[tokens]).double() - states).detach()  # the sum, rounded to its dtype
    log_p = torch.log_softmax(states @ exact.t() / case.temperature, -1)
    logp, entropy = log_p.gather(1, case.targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    case = replace(case, old_logp=logp.detach().float() - log_ratios(35))
    case.token_loss(slice(None), logp, entropy).backward()

    here, rows = on_device(case, device), tokens.to(device)
    weight = here.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=device)
    hidden = here.hidden + torch.nn.functional.embedding(rows, weight)
    options = {"shard": VocabShard(1003, 1003), "temperature": case.temperature, "chunk_rows": 11, "backend": backend}
    loss, _, _ = vocab_parallel_loss(hidden, weight, here.targets, here.token_loss, **options)
    loss.backward()
    assert weight.grad_added_to_main_grad
    found = weight.main_grad + (weight.grad.to_dense() if weight.grad.is_sparse else weight.grad)
    assert (found.double().cpu() - exact.grad).norm() < tolerance * exact.grad.norm()

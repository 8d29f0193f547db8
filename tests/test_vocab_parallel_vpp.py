"""The single-pass loss under an interleaved pipeline schedule: its gradient is added in forward, long before its backward."""

from __future__ import annotations

import torch

from tests import vpp_jobs


def test_gradients_under_interleaving_and_overlapped_reduction_over_replicas_equal_autograd_over_all_of_them(gangs):
    named = {name: tensor.double().requires_grad_() for name, tensor in vpp_jobs.parameters().items()}
    for number in range(vpp_jobs.REPLICAS * vpp_jobs.MICROBATCHES):
        case = vpp_jobs.microbatch(number)
        states = case.hidden.double()
        for layer in range(vpp_jobs.LAYERS):
            states = torch.tanh(states @ named[f"layer{layer}"])
        log_p = torch.log_softmax(states @ named["head"].t(), -1)
        logp = log_p.gather(1, case.targets[:, None])[:, 0]
        case.token_loss(slice(None), logp, -(log_p.exp() * log_p).sum(-1)).backward()
    found: dict[str, list[torch.Tensor]] = {}
    for reply in gangs(2 * vpp_jobs.REPLICAS).run("tests.vpp_jobs:interleaved"):
        for name, gradient in reply.items():
            found.setdefault(name, []).append(gradient)
    assert found.keys() == named.keys()
    for name, parameter in named.items():
        assert len(found[name]) == vpp_jobs.REPLICAS
        for gradient in found[name]:
            torch.testing.assert_close(gradient.double(), parameter.grad, atol=1e-5, rtol=1e-5)

"""The single-pass loss under an interleaved pipeline schedule: its gradient is added in forward, long before its backward."""

from __future__ import annotations

import torch

from tests import vpp_jobs


def test_gradients_under_interleaving_and_overlapped_reduction_equal_autograd(gangs):
    named = {name: tensor.double().requires_grad_() for name, tensor in vpp_jobs.parameters().items()}
    for number in range(vpp_jobs.MICROBATCHES):
        case = vpp_jobs.microbatch(number)
        states = case.hidden.double()
        for layer in range(vpp_jobs.LAYERS):
            states = torch.tanh(states @ named[f"layer{layer}"])
        log_p = torch.log_softmax(states @ named["head"].t(), -1)
        logp = log_p.gather(1, case.targets[:, None])[:, 0]
        case.token_loss(slice(None), logp, -(log_p.exp() * log_p).sum(-1)).backward()
    found = {name: grad for reply in gangs(2).run("tests.vpp_jobs:interleaved") for name, grad in reply.items()}
    assert found.keys() == named.keys()
    for name, parameter in named.items():
        torch.testing.assert_close(found[name].double(), parameter.grad, atol=1e-5, rtol=1e-5)

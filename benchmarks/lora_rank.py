"""The rank of the LoRA benchmark: `python -m benchmarks.lora_rank JOB`, started by `benchmarks.lora`.

JOB is JSON: part (seconds, sizes or effect), model, overrides, samples and tokens (of the responses that are timed), updates
(after which effects are looked at), folder (for a checkpoint), and rank, world, store (rendezvous file) and result (file to
write).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from etr_megatron.platform.lifetime import die_with_parent

die_with_parent()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.gpu_policy import make_batch  # noqa: E402
from etr_megatron import checkpoint  # noqa: E402
from etr_megatron.checkpoint.optimizer_shards import optimizers_of  # noqa: E402
from etr_megatron.config import load_config, resolve  # noqa: E402
from etr_megatron.policy import Policy, configured_layout  # noqa: E402
from etr_megatron.status import run_and_exit  # noqa: E402
from etr_megatron.weights import read_architecture  # noqa: E402

SETTINGS = ["parallel.tp=1", "train.lr=1e-5", "train.tokens_per_microbatch=2048"]
UPDATES = 6
"""Number of timed updates, including the first, which is slower and not counted."""


def build(job: dict[str, Any], dtype: str, samples: int, response: int) -> tuple[Policy, Any]:
    """The policy, and a batch of `samples` responses of `response` tokens whose old log-probs are the policy's own."""
    overrides = [f"model.path={job['model']}", f"model.dtype={dtype}", *SETTINGS, *job["overrides"]]
    config = resolve(load_config(None, overrides), 1, cuda=False)
    policy = Policy(read_architecture(job["model"]), job["model"], config, configured_layout(config))
    generator = torch.Generator().manual_seed(4)

    def tokens(count: int) -> list[int]:
        return torch.randint(policy.arch.vocab_size, (count,), generator=generator).tolist()

    pairs = [(tokens(8 + number), tokens(response)) for number in range(samples)]
    return policy, make_batch(pairs, policy.logprobs(pairs).logp)


def seconds(job: dict[str, Any]) -> list[float]:
    """Seconds of each update in fp32."""
    policy, batch = build(job, "float32", job["samples"], job["tokens"])
    found = []
    for _ in range(UPDATES):
        start = time.perf_counter()
        policy.update(batch)
        found.append(time.perf_counter() - start)
    return found[1:]


def sizes(job: dict[str, Any]) -> dict[str, int]:
    """Bytes of a bf16 model's tensors and of its checkpoint after an update."""
    policy, batch = build(job, "bfloat16", 2, 8)
    policy.update(batch)
    folder = Path(job["folder"]) / "checkpoints"
    checkpoint.save(folder, 1, policy, {}, keep=1)
    return {
        "gradient_bytes": sum(buffer.grad_data.nbytes for chunk in policy._ddp for buffer in chunk.buffers),
        "optimizer_bytes": sum(map(_optimizer_bytes, optimizers_of(policy.optimizer))),
        "base_bytes": sum(one.base.nbytes for part in policy.adapters._of_chunks for one in part._adapted),
        "checkpoint_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _optimizer_bytes(optimizer: Any) -> int:
    """Adam's moments and, for bf16 weights, the fp32 copies that it updates."""
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    copies = [one for group in getattr(optimizer, "fp32_from_float16_groups", []) for one in group]
    return sum(one.nbytes for one in (*states, *copies) if isinstance(one, Tensor))


def effect(job: dict[str, Any]) -> list[dict[str, float]]:
    """After each of `updates`: the share of the improvement that remains after rounding, and the share of elements changed."""
    from transformers import AutoModelForCausalLM

    policy, batch = build(job, "bfloat16", 4, 16)
    hf = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    base = {name: tensor.detach().to(torch.bfloat16) for name, tensor in hf.state_dict().items()}
    start, found, done = objective(hf, base, batch), [], 0
    for wanted in job["updates"]:
        for _ in range(wanted - done):
            policy.update(batch)
        done = wanted
        exact = with_products(base, policy)
        nearest = {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()}
        ours = {name: tensor.clone() for name, tensor in policy.export()}
        gain = objective(hf, base | exact, batch) - start
        found.append(
            {
                "updates": wanted,
                "exact_gain": gain,
                "nearest": (objective(hf, base | nearest, batch) - start) / gain,
                "ours": (objective(hf, base | ours, batch) - start) / gain,
                "nearest_changed": changed(nearest, base),
                "ours_changed": changed({name: ours[name] for name in exact}, base),
            }
        )
    return found


def with_products(base: dict[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    """The adapted weights, fp32, without rounding them to bf16."""
    factors = {name: factor.detach().double() for name, factor in policy.adapters.named().items()}
    scale = policy.config.lora.alpha / policy.config.lora.rank
    modules = [name.removeprefix("lora.").removesuffix(".A") for name in factors if name.endswith(".A")]
    return {
        f"{name}.weight": (
            base[f"{name}.weight"].double() + scale * factors[f"lora.{name}.B"] @ factors[f"lora.{name}.A"]
        ).float()
        for name in modules
    }


@torch.no_grad()
def objective(hf: Any, weights: dict[str, Tensor], batch: Any) -> float:
    """Mean over tokens of advantage times log-prob, computed in fp32 with these weights."""
    hf.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    total = 0.0
    for one, advantage in zip(batch.sequences, batch.advantage, strict=True):
        logits = hf(torch.tensor([one[0] + one[1]])).logits[0, len(one[0]) - 1 : -1].double()
        logp = torch.log_softmax(logits, -1).gather(1, torch.tensor(one[1])[:, None])
        total += float(advantage * logp.sum())
    return total / sum(len(one[1]) for one in batch.sequences)


def changed(weights: dict[str, Tensor], base: dict[str, Tensor]) -> float:
    """Share of elements that differ from the base's."""
    different = sum(int((tensor != base[name]).sum()) for name, tensor in weights.items())
    return different / sum(tensor.numel() for tensor in weights.values())


def main() -> int:
    """Run the job of the command line and write its result."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job['store']}", world_size=job["world"], rank=job["rank"])
    part = {"seconds": seconds, "sizes": sizes, "effect": effect}[job["part"]]
    Path(job["result"]).write_text(json.dumps(part(job)))
    return 0


if __name__ == "__main__":
    run_and_exit(main)

"""Part `policy` of the GPU benchmark: optimizer steps of a slice of Qwen3-8B in bf16 and in each FP8 recipe.

The slice has Qwen3-8B's full widths, embedding and head, some of its layers, and random weights. Recipes run one after the
other, each in its own process, `python -m benchmarks.gpu_policy JOB` (JOB is JSON). bf16 runs first and, if there is FP8, again
at the end, which shows how much the device itself drifted. `bf16_recompute` has `train.recompute=full`.

`state_bytes` and `peak_bytes` are of torch's allocator, between updates and during one; `planned_state_bytes` and
`planned_peak_bytes` are the planner's estimates of them. `runtime_bytes` is the device memory in use beyond what the allocator
reserved: the CUDA context, libraries and workspaces.

Tokens/s counts prompts and responses. MFU is

    3 * (forward FLOPs of body and head, `etr_megatron.flops`) / (median seconds of an update * dense bf16 peak of the device)

for all recipes, including FP8, so that figures are comparable. Attention counts as causal, the head for response tokens only,
and recomputation is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_device import RECIPES, bf16_peak, recipes_left_out, release_memory, seconds_of
from benchmarks.targets import summary
from etr_megatron.status import run_and_exit

ROOT = Path(__file__).resolve().parents[1]

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYERS = 8
"""Layers in the slice; Qwen3-8B has 36. With Adam's state they take 18 bytes per parameter: 50 GB beside the activations."""

WORKLOAD = {"samples": 8, "prompt": 256, "response": 1792, "tokens_per_microbatch": 8192}

QUICK = {**QWEN3_8B, "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2}
QUICK |= {"vocab_size": 1507, "max_position_embeddings": 512}
QUICK_WORKLOAD = {"samples": 6, "prompt": 5, "response": 43, "tokens_per_microbatch": 100}

SEED = 3


def write_checkpoint(folder: Path, shape: dict[str, Any], layers: int, device: torch.device) -> None:
    """Write a HuggingFace checkpoint in bf16: matrices of standard deviation 0.02, norms 1. Values are drawn on the device."""
    from etr_megatron.convert.safetensors_writer import SafetensorsWriter, TensorToWrite
    from etr_megatron.weights import read_architecture, weights_of

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": layers}))
    shapes = {n: s for w in weights_of(read_architecture(folder)) for n, s in zip(w.hf, w.shapes, strict=True)}
    writer = SafetensorsWriter(folder, [TensorToWrite(name, torch.bfloat16, size) for name, size in shapes.items()], 4 * 10**9)
    writer.create()
    generator = torch.Generator(device).manual_seed(SEED)
    for name, size in shapes.items():
        values = torch.ones(size, dtype=torch.bfloat16, device=device)
        if len(size) > 1:
            values.normal_(0, 0.02, generator=generator)
        writer.write(name, (0,) * len(size), values.cpu())


def sequences_for(workload: dict[str, int], vocab: int) -> list[tuple[list[int], list[int]]]:
    """Random (prompt ids, response ids), all of the same length."""
    generator = torch.Generator().manual_seed(SEED)
    size = (workload["samples"], workload["prompt"] + workload["response"])
    tokens = torch.randint(0, vocab, size, generator=generator).tolist()
    return [(one[: workload["prompt"]], one[workload["prompt"] :]) for one in tokens]


def make_batch(sequences: list[tuple[list[int], list[int]]], old: tuple[Tensor, ...]) -> Any:
    """A `PolicyBatch` of one group with advantages of both signs; `old` are the old log-probs."""
    from etr_megatron.policy import PolicyBatch

    count, tokens = len(sequences), sum(len(response) for _, response in sequences)
    return PolicyBatch(
        names=tuple(f"sample {number}" for number in range(count)),
        sequences=tuple(sequences),
        advantage=torch.linspace(-1, 1, count),
        clip_low=torch.full((count,), 0.2),
        clip_high=torch.full((count,), 0.28),
        weight=torch.full((count,), 1 / tokens),
        group_mean=torch.full((count,), 0.5),
        group_std=torch.full((count,), 0.5),
        variance=torch.full((count,), 0.25),
        pass_rate_bin=torch.zeros(count, dtype=torch.long),
        rollout_logp=old,
        old_logp=old,
    )


def flops_of_update(arch: Any, workload: dict[str, int]) -> float:
    """Model FLOPs of a forward and a backward pass over the workload."""
    from etr_megatron.flops import sequence_flops

    tokens, rows = workload["prompt"] + workload["response"], workload["response"]
    return 3 * workload["samples"] * sequence_flops(arch, tokens, rows)


def planned_bytes(settings: list[str], workload: dict[str, int]) -> dict[str, int]:
    """The planner's estimates of a job's memory on one GPU."""
    from etr_megatron.config import load_config
    from etr_megatron.planner import make_plan

    lengths = [f"data.max_prompt_tokens={workload['prompt']}", f"rollout.max_response_tokens={workload['response']}"]
    config = load_config(None, [*settings, *lengths, "rollout.backend=embedded"])
    (rank,) = make_plan(config, 1, prompt=workload["prompt"], response=workload["response"]).ranks
    state = rank.parameters + rank.gradients + rank.optimizer
    return {"planned_state_bytes": state, "planned_peak_bytes": state + rank.activations + rank.head}


def _cudnn_version() -> str:
    """Version of the library that attention uses. Asking torch would load torch's own, and mix two versions."""
    import transformer_engine_torch

    return str(transformer_engine_torch.get_cudnn_version())


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Build the policy, train it, and report its speed. A first update at learning rate 0 gives delayed scaling its first
    maxima; the batch's log-probs after it go to the file `job["logp"]`."""
    from etr_megatron import platform
    from etr_megatron.config import load_config, resolve
    from etr_megatron.policy import Policy, Update, configured_layout
    from etr_megatron.weights import read_architecture

    cuda, workload = platform.uses_cuda(), job["workload"]
    settings = [
        f"model.path={job['model']}",
        f"fp8.recipe={job['recipe']}",
        f"train.tokens_per_microbatch={workload['tokens_per_microbatch']}",
        "parallel.tp=1",
        "train.lr_warmup_updates=1",
        *job["settings"],
    ]
    config = resolve(load_config(None, settings), 1, cuda=cuda)
    arch = read_architecture(job["model"])
    policy = Policy(arch, job["model"], config, configured_layout(config))
    sequences, device = sequences_for(workload, arch.vocab_size), platform.device()
    policy.update(make_batch(sequences, policy.logprobs(sequences).logp))
    old = policy.logprobs(sequences).logp
    torch.save(torch.cat(old), job["logp"])
    batch = make_batch(sequences, old)
    policy.update(batch)
    state = torch.cuda.memory_allocated() if cuda else None
    if cuda:
        free, total = torch.cuda.mem_get_info()
        runtime = total - free - torch.cuda.memory_reserved()
    updates: list[Update] = []
    seconds = [seconds_of(lambda: updates.append(policy.update(batch)), device) for _ in range(job["rounds"])]
    peak = max(round(one.memory["memory_allocated_gib"] * 2**30) for one in updates) if cuda else None
    forward = [seconds_of(lambda: policy.logprobs(sequences), device) for _ in range(job["rounds"])]
    tokens = workload["samples"] * (workload["prompt"] + workload["response"])
    flops, limit = flops_of_update(arch, workload), bf16_peak(torch.cuda.get_device_name(device)) if cuda else None
    update = summary(seconds)
    return {
        "settings": settings[1:],
        "dtype": config.model.dtype,
        "cudnn": _cudnn_version() if cuda else None,
        "update": update,
        "logprobs": summary(forward),
        "tokens_per_s": tokens / update["median_s"],
        "flops_of_update": flops,
        "mfu": flops / (update["median_s"] * limit) if limit else None,
        "state_bytes": state,
        "peak_bytes": peak,
        "runtime_bytes": runtime if cuda else None,
        **planned_bytes(settings, workload),
        "losses": [one.loss for one in updates],
    }


def measure(options: Any, work: Path) -> dict[str, Any]:
    """All recipes. options: command line. work: an empty directory with room for the checkpoint."""
    quick, device = options.quick, torch.device(options.device)
    shape, workload = (QUICK, QUICK_WORKLOAD) if quick else (QWEN3_8B, WORKLOAD)
    layers = options.layers or (2 if quick else LAYERS)
    model = work / "model"
    write_checkpoint(model, shape, layers, device)
    release_memory()
    left_out = recipes_left_out(device)
    recipes = [recipe for recipe in RECIPES if recipe not in left_out]
    found: dict[str, Any] = {"model": {**shape, "num_hidden_layers": layers}, "workload": workload, "left_out": left_out}
    found["recipes"] = {}
    baseline: Tensor | None = None
    for name in ["bf16", *recipes, "bf16_recompute", *(["bf16_again"] if recipes else [])]:
        recipe = "none" if name.startswith("bf16") else name
        settings = [*options.set, *(["train.recompute=full"] if name == "bf16_recompute" else [])]
        job = {"model": str(model), "recipe": recipe, "workload": workload, "rounds": options.rounds, "settings": settings}
        one, logp = _run(job, work, options.device)
        if logp is not None:
            baseline = logp if baseline is None else baseline
            one["logprob_gap_to_bf16"] = (logp - baseline).abs().mean().item()
        bf16 = found["recipes"].get("bf16", {}).get("tokens_per_s")
        if bf16 and "tokens_per_s" in one:
            one["speed_x_bf16"] = one["tokens_per_s"] / bf16
        found["recipes"][name] = one
        print(row(name, one), flush=True)
    return found


def _run(job: dict[str, Any], work: Path, device: str) -> tuple[dict[str, Any], Tensor | None]:
    """Result and log-probs of a job in its own process; if it failed, the error and None."""
    result, logp = work / "result.json", work / "logp.pt"
    for file in (result, logp):
        file.unlink(missing_ok=True)
    job = {**job, "result": str(result), "logp": str(logp), "store": str(work / f"store_{len(list(work.iterdir()))}")}
    env = {**os.environ, "ETR_PLATFORM": device, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_policy", json.dumps(job)], cwd=ROOT, env=env)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}, None
    return json.loads(result.read_text()), torch.load(logp)


def row(name: str, one: dict[str, Any]) -> str:
    """A recipe as a line of text."""
    if "failed" in one:
        return f"policy {name}: failed, {one['failed']}"
    mfu = "no peak known" if one["mfu"] is None else f"MFU {one['mfu']:.3f}"
    peak = "-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**30:.1f} GiB"
    peak += f" (planned {one['planned_peak_bytes'] / 2**30:.1f})"
    speed = f", {one['speed_x_bf16']:.2f} x bf16" if "speed_x_bf16" in one else ""
    return (
        f"policy {name} ({one['dtype']}): {one['tokens_per_s']:,.0f} tokens/s{speed}, {mfu}, peak {peak}, log-prob gap to bf16 "
        f"{one['logprob_gap_to_bf16']:.1e}"
    )


def main() -> int:
    """Run the job of the command line and write its result."""
    job = json.loads(sys.argv[1])
    import torch.distributed as dist

    from etr_megatron import platform
    from etr_megatron.platform.lifetime import die_with_parent

    die_with_parent()
    if platform.uses_cuda():
        torch.cuda.set_device(0)
    dist.init_process_group(platform.backend(), init_method=f"file://{job['store']}", rank=0, world_size=1)
    Path(job["result"]).write_text(json.dumps(run_job(job)))
    return 0


if __name__ == "__main__":
    run_and_exit(main)

"""The commands that start the job's servers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import etr_megatron
from etr_megatron.config import SglangConfig, sync_of
from etr_megatron.config.schema.fp8 import FP8_BLOCK
from etr_megatron.errors import UserError
from etr_megatron.rollout.sglang.arguments import names_of
from etr_megatron.rollout.sglang.server import ServerCommand
from etr_megatron.weights.architecture import BIASED_ROUTERS
from etr_megatron.weights.hf_config import read_config

LOADER = "etr_megatron.weights.transport.server_loader.load"
"""The weight loader that servers are started with for `sync: sharded`."""

ROUTING = "--enable-return-routed-experts"
NO_TOKENIZER = "--skip-tokenizer-init"

_UNFUSED = "--disable-shared-experts-fusion"
_OVERRIDES = "--json-model-override-args"


def server_command(
    config: SglangConfig,
    model_dir: Path,
    dtype: str,
    *,
    place: int,
    host: str,
    folder: Path,
    api_key: str | None,
    cuda: bool,
    routing: bool = False,
    tokenizer: bool = False,
    part: int = 0,
) -> ServerCommand:
    """The command of server number `place` of a node.

    folder: where this function writes other files that the server reads. routing: whether the server must return the chosen
    experts. tokenizer: whether it needs a tokenizer, to match stop strings. part: number of this node among those that the
    server spans, see `parts`.

    The server starts with random weights and gets the policy's before its first request. So model_dir needs only a config.json
    and, with `tokenizer`, a tokenizer; a Megatron checkpoint will do. An api_key is passed in a file that only the user can
    read. Raises UserError when `sglang.devices` names a GPU that a rank trains on, or names none and too few GPUs are left.
    """
    shares_gpus = config.placement == "colocated" and cuda
    arguments = ["--model-path", str(model_dir), "--dtype", dtype, "--load-format", "dummy", *_parallelism(config, part)]
    arguments += [] if tokenizer else [NO_TOKENIZER]
    # An idle server would otherwise keep a CPU core busy that the machine's ranks need.
    arguments += [] if cuda else ["--sleep-on-idle"]
    if config.mem_fraction is not None and not shares_gpus:
        arguments += ["--mem-fraction-static", str(config.mem_fraction)]
    if config.context_length is not None:
        arguments += ["--context-length", str(config.context_length)]
    model = _model_config(model_dir)
    if overrides := _overrides(config, model):
        if _OVERRIDES in names_of(config.arguments):
            raise UserError(
                f"sglang.arguments: {_OVERRIDES} would replace what the job sets there ({', '.join(overrides)}); change "
                f"{model_dir / 'config.json'} instead"
            )
        arguments += [_OVERRIDES, json.dumps(overrides)]
    arguments += [*(_plain_kernels(config, model) if cuda else []), *_plain_experts(config, model)]
    arguments += ["--enable-memory-saver"] if shares_gpus else []
    arguments += [ROUTING] if routing else []
    arguments += ["--custom-weight-loader", LOADER] if sync_of(config) == "sharded" else []
    if api_key is not None:
        arguments += ["--config", _key_file(folder, f"{host}_{place}", api_key)]
    return ServerCommand(
        config.python,
        config.launch,
        (*arguments, *config.arguments),
        _environment(config, place=place, host=host, folder=folder, cuda=cuda),
        host,
        "weight_version",
        api_key,
        memory=config.mem_fraction if shares_gpus else None,
        shares_gpus=shares_gpus,
        parts=config.nodes_per_server,
        part=part,
    )


def _parallelism(config: SglangConfig, part: int) -> list[str]:
    """Arguments for the ranks of a server."""
    found = ["--tp-size", str(config.tp)]
    if config.nodes_per_server > 1:  # the rendezvous address is added at the start
        found += ["--nnodes", str(config.nodes_per_server), "--node-rank", str(part)]
    found += ["--ep-size", str(config.ep)] if config.ep > 1 else []
    return found + (["--dp-size", str(config.dp_attention), "--enable-dp-attention"] if config.dp_attention > 1 else [])


def _environment(config: SglangConfig, *, place: int, host: str, folder: Path, cuda: bool) -> dict[str, str]:
    """Environment variables of a server, in addition to those of the job."""
    found = {}
    if config.nodes_per_server > 1:
        # By default the server's ranks connect to each other at the addresses from which their machines reach the internet.
        found["SGLANG_HOST_IP"] = os.environ.get("SGLANG_HOST_IP") or host
    if config.placement == "colocated" and cuda:
        # SGLang does not start if one of its GPUs has over a tenth less free memory than another. At a restart this is normal,
        # because ranks of different pipeline stages hold different amounts. SGLang sizes its cache by the least in any case.
        found["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
    if sync_of(config) == "sharded":
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (_this_package(folder), os.environ.get("PYTHONPATH"))))
    tp = config.tp_on_a_node
    named = config.devices[place * tp : (place + 1) * tp]
    if devices := _gpus(config, place, named) if cuda else named:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return found


def _overrides(config: SglangConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of config.json that must be overridden for a server. model: the fields of that file."""
    found: dict[str, Any] = {}
    if config.fp8:
        blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
        found["quantization_config"] = {"fmt": "e4m3", **blocks}
    elif model.get("quantization_config"):
        # A model stored in FP8 is trained in `model.dtype` and, without `sglang.fp8`, also served in that dtype.
        found["quantization_config"] = None
    # Published config files have these fields, but transformers 5 drops them, and SGLang has no defaults for them.
    unwritten: dict[str, Any] = {}
    if model.get("model_type") == "deepseek_v3":
        unwritten = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    elif model.get("model_type") == "glm4_moe_lite":
        unwritten = {"first_k_dense_replace": (model.get("mlp_layer_types") or ["dense"]).count("dense")}
    return found | {name: value for name, value in unwritten.items() if name not in model}


def _gpus(config: SglangConfig, place: int, asked: tuple[str, ...]) -> tuple[str, ...]:
    """GPUs of a server, as CUDA_VISIBLE_DEVICES names them. Empty when no GPU is visible.

    These are `asked` if `sglang.devices` is set. Otherwise they are, in order, the ranks' GPUs for colocated servers, and the
    GPUs after those for other servers. Without CUDA_VISIBLE_DEVICES every server would take the machine's first GPUs.
    """
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    alone = config.placement == "colocated" or config.dedicated_nodes > 0
    ranks = 0 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    taken = [gpus.index(gpu) for gpu in config.devices if gpu in gpus[:ranks]]
    if taken:
        way_out = f"start only {min(taken)} ranks here (--nproc-per-node)" if min(taken) else "name other GPUs"
        raise UserError(
            f"sglang.devices names GPU {gpus[taken[0]]}, on which one of the {ranks} ranks of this machine trains; {way_out}, "
            "or set sglang.placement=colocated"
        )
    if asked:
        return asked
    first = ranks + place * config.tp_on_a_node
    if gpus and first + config.tp_on_a_node > len(gpus):
        beside, way_out = "", ""
        if ranks:
            beside = f" besides those of {ranks} ranks"
            way_out = ", start fewer ranks, or set sglang.placement=colocated, where servers share the ranks' GPUs"
        over, lower = "", "lower one of the two"
        if config.nodes_per_server > 1:
            over = f" on sglang.nodes_per_server={config.nodes_per_server} nodes"
            lower = "raise nodes_per_server, lower tp"
        raise UserError(
            f"sglang.servers={config.servers} with sglang.tp={config.tp}{over} need {config.gpus_of_a_node} GPUs{beside}, but "
            f"this machine has {len(gpus)}; {lower}{way_out}"
        )
    return tuple(gpus[first : first + config.tp_on_a_node])


def _plain_kernels(config: SglangConfig, model: Mapping[str, Any]) -> list[str]:
    """Arguments for kernels that keep the layout of weights as they are sent, unless the user chose others. model: config.json.

    On Blackwell (SM100) SGLang's default kernels change the layout, so that no weight update can be loaded. DeepGEMM packs the
    scales of FP8 blocks into another dtype and shape; flashinfer_trtllm rearranges bfloat16 experts into blocks. For
    DeepSeek-V3, SGLang also searches the files for FP8 experts and then quantises all layers, whatever the config says.
    """
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 10:
        return []
    experts = any(model.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    plain = model.get("model_type") == "deepseek_v3" and model.get("quantization_config") and not config.fp8
    wanted = {
        "--fp8-gemm-backend": "triton" if config.fp8 else None,
        "--moe-runner-backend": "triton" if experts else None,
        "--quantization": "unquant" if plain else None,
    }
    given = set(names_of(config.arguments))
    return [word for name, value in wanted.items() if value and name not in given for word in (name, value)]


def _plain_experts(config: SglangConfig, model: Mapping[str, Any]) -> list[str]:
    """Arguments that keep a shared expert in parameters of its own, unless the user chose otherwise. model: config.json.

    On GPUs SGLang appends the shared expert to the routed experts, whose shapes then differ from the sync plan. It refuses to
    load two shared experts that way.
    """
    shared = model.get("n_shared_experts")
    if shared is None:
        shared = 1 if model.get("model_type") in BIASED_ROUTERS else 0  # transformers' default
    needed = shared > 1 or (shared == 1 and sync_of(config) == "sharded")
    given = {_UNFUSED, "--enforce-shared-experts-fusion"} & set(names_of(config.arguments))
    return [_UNFUSED] if needed and not given else []


def _model_config(model_dir: Path) -> dict[str, Any]:
    """config.json; empty if there is none."""
    try:
        return read_config(model_dir / "config.json")
    except FileNotFoundError:
        return {}


def _this_package(folder: Path) -> str:
    """A directory from which the server can import only this package, and none of the trainer's other packages."""
    folder.mkdir(parents=True, exist_ok=True)
    link, package = folder / "python" / "etr_megatron", Path(etr_megatron.__file__).resolve().parent
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink() or link.resolve() != package:
        fresh = link.with_name(f".etr_megatron.{socket.gethostname()}.{os.getpid()}")
        fresh.symlink_to(package)
        fresh.replace(link)
    return str(link.parent.absolute())


def _key_file(folder: Path, server: str, api_key: str) -> str:
    """Write the API key to a file, because every user of the machine could read it on a command line."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".{server}.yaml"
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as output:
        output.write(f"api-key: {json.dumps(api_key)}\n")
    return str(file.absolute())

"""Runs inside a server's worker: opens a wire to the training ranks and receives the worker's shards into its live parameters.

Start the server with `--custom-weight-loader etr_megatron.weights.transport.server_loader.load` and send, by
`/update_weights_from_tensor` with that path as `load_format`, one tiny tensor to each tensor-parallel rank: `Offer.message()`.
Meanwhile the training ranks enter `ShardedTransport.sync` with the same plan. The first sync opens the connection, later ones
reuse it. This module imports nothing of Megatron or of the server's package.

How it is loaded: a worker's `update_weights_from_tensor` finds `load_format` among the paths that the server was started with,
imports it by that path (so this package must be importable in the server's environment) and calls it with the live model and
with the tensors of its own rank. Module state outlives the call and keeps the open connection.

After a failed sync the connection is dropped, and the next offer opens a new one. For it the training ranks need a new
transport and also a new store, because other ranks may still read the reason of the failure from the old store.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etr_megatron.weights.architecture import Architecture, Experts
from etr_megatron.weights.latent import LatentAttention
from etr_megatron.weights.layout import ServerLayout, TrainingLayout, shards_of
from etr_megatron.weights.listing import listed
from etr_megatron.weights.map import Weight
from etr_megatron.weights.quantize import SCALE_SUFFIX
from etr_megatron.weights.reshard import ReshardPlan, make_reshard_plan
from etr_megatron.weights.transport.base import expected_shards
from etr_megatron.weights.transport.board import Board, SyncError
from etr_megatron.weights.transport.sharded import ShardedTransport
from etr_megatron.weights.transport.wire import Wire

logger = logging.getLogger(__name__)

MESSAGE_NAME = "etr_megatron.sync_offer"
"""Name of the tiny tensor that carries an offer."""

_OWN_ORDERS = ("load_up_proj_weight_first", "w13_swiglu_interleaved", "use_flashinfer_trtllm_moe")
"""Flags of a layer or its `quant_method` which say that fused experts do not have gate above up. Shapes do not show this."""


class ShardMismatchError(ValueError):
    """A worker's parameters do not match an offer."""


def refusal_key(rank: int) -> str:
    """Key in process 0's store under which a rank of the destination records why it refuses the weights."""
    return f"refused/{rank}"


@dataclass(frozen=True)
class Offer:
    """Everything that a worker needs for a sync. address, port: of the store in the training ranks' process 0.

    rank: the worker's rank in the destination. The other fields are arguments of `make_reshard_plan`, `Wire` and
    `ShardedTransport`; they must be the same on the training ranks and all workers.
    """

    version: int
    address: str
    port: int
    rank: int
    source: TrainingLayout
    destination: ServerLayout
    arch: Architecture
    dtype: str = "bfloat16"
    fp8_block: int | None = None
    bucket_bytes: int = 64 << 20
    checksums: bool = False
    backend: str = "gloo"
    timeout_s: float = 600.0

    def message(self) -> Tensor:
        """The offer as a uint8 tensor on the CPU."""
        fields = asdict(self)
        if self.arch.experts is not None:
            fields["arch"]["experts"]["dense_layers"] = sorted(self.arch.experts.dense_layers)
        return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    @classmethod
    def read(cls, message: Tensor) -> Offer:
        """The inverse of `message`. Raises ValueError for an offer that another version of this package has sent."""
        try:
            return cls._of(json.loads(bytes(message.cpu().tolist())))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the offer of a weight sync cannot be read ({error}): the server and the job need the same etr_megatron"
            ) from error

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> Offer:
        arch = fields["arch"]
        if arch["experts"] is not None:
            arch["experts"] = Experts(**{**arch["experts"], "dense_layers": frozenset(arch["experts"]["dense_layers"])})
        if arch["latent"] is not None:
            arch["latent"] = LatentAttention(**arch["latent"])
        fields["arch"] = Architecture(**arch)
        fields["source"], fields["destination"] = TrainingLayout(**fields["source"]), ServerLayout(**fields["destination"])
        return cls(**fields)

    @property
    def process(self) -> int:
        """The worker's process: the training ranks come first."""
        return self.source.world + self.rank

    def plan(self) -> ReshardPlan:
        """The plan of the sync."""
        itemsize = getattr(torch, self.dtype).itemsize
        return make_reshard_plan(self.source, self.destination, self.arch, itemsize=itemsize, fp8_block=self.fp8_block)

    def store(self) -> dist.TCPStore:
        """A worker's connection to the store. Raises SyncError if there is none."""
        timeout = datetime.timedelta(seconds=self.timeout_s)
        try:
            return dist.TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=timeout)
        except RuntimeError as error:
            what = f"rank {self.process} did not reach rank 0 within {self.timeout_s:g} s"
            raise SyncError(f"weight sync: {what} at {self.address}:{self.port}") from error

    def board(self, store: dist.Store, process: int) -> Board:
        """The board of a process of the sync."""
        processes = self.source.world + self.destination.world
        return Board(dist.PrefixStore("board", store), process, processes, self.timeout_s)

    def refuse(self, reason: str) -> None:
        """Tell the training ranks, which would otherwise wait for this worker. Raises SyncError if their store is gone."""
        store = self.store()
        store.set(refusal_key(self.rank), reason)
        self.board(store, self.process).report(reason)

    def transport(self, store: dist.Store, process: int) -> ShardedTransport:
        """The transport of a process; a collective of the training ranks (from 0) and all workers (after them)."""
        plan = self.plan()
        wire = Wire(store, process, plan.processes, backend=self.backend, timeout_s=self.timeout_s)
        return ShardedTransport(
            plan, wire, dtype=getattr(torch, self.dtype), bucket_bytes=self.bucket_bytes, checksums=self.checksums
        )


def server_shards(parameters: Mapping[str, Tensor], offer: Offer) -> dict[str, Tensor]:
    """A worker's parameters by `Weight.megatron`, as views: for an expert, its slot in the fused parameter; for a weight that
    shares a parameter with others, its rows.

    Raises ShardMismatchError naming the parameters that the server does not have, or has in another shape.
    """
    found: dict[str, Tensor] = {}
    problems = []
    wanted = expected_shards(offer.destination, offer.arch, offer.rank, offer.fp8_block)
    held: dict[str, list[Weight]] = {}
    for weight, _ in shards_of(offer.destination, offer.arch, offer.rank):
        held.setdefault(weight.server, []).append(weight)
    for server, weights in held.items():
        are_experts = weights[0].expert is not None
        for suffix in ("", SCALE_SUFFIX):
            keys = [weight.megatron + suffix for weight in weights if weight.megatron + suffix in wanted]
            if not keys:
                continue
            name, shapes = server + suffix, [wanted[key].shape for key in keys]
            tensor, rows = parameters.get(name), [shape[0] for shape in shapes]
            whole = (len(keys), *shapes[0]) if are_experts else (sum(rows), *shapes[0][1:])
            if tensor is None:
                problems.append(f"there is no {name}")
            elif tuple(tensor.shape) != whole:
                problems.append(f"{name} is {tuple(tensor.shape)}, not {whole}")
            else:
                found |= zip(keys, tensor.unbind() if are_experts else tensor.split(rows), strict=True)
    if problems:
        differing = listed(problems, "; ")
        missing = [problem for problem in problems if problem.startswith("there is no")]
        is_fused = missing and all(".shared_experts." in problem for problem in missing)
        way_out = "; start it with --disable-shared-experts-fusion" if is_fused else ""
        raise ShardMismatchError(f"the server's parameters do not match the offer: {differing}{way_out}")
    return found


def refuse_other_orders(model: Any) -> None:
    """Raise ShardMismatchError if a layer of the worker's model stores the rows of its experts in another order."""
    for name, module in model.named_modules():
        for order in _OWN_ORDERS:
            if getattr(module, order, False) or getattr(getattr(module, "quant_method", None), order, False):
                raise ShardMismatchError(
                    f"the server keeps the experts of {name} in its own order ({order}); start it with --moe-runner-backend "
                    "triton, or send whole tensors (sglang.sync=broadcast)"
                )


_open: dict[str, ShardedTransport] = {}
"""The open transport, by its offer without the version; at most one."""


def load(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """`receive`, as SGLang calls a custom weight loader: an exception raised here ends the worker.

    So it raises neither of two errors. A sync that did not complete is logged; the training ranks know of it. The worker then
    has a mixture of two versions, and must get a complete one before it serves. Parameters that do not match the offer are
    reported to the training ranks. Other errors are raised.
    """
    named = dict(named_tensors)
    try:
        receive(model, named)
    except SyncError as error:
        logger.error("%s", error)
    except ShardMismatchError as error:
        logger.error("%s", error)
        Offer.read(named[MESSAGE_NAME]).refuse(str(error))


@torch.no_grad()
def receive(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Receive a version into the parameters of a worker's `model`, and recompute what the model derives from them.

    tensors: only the tiny one. Raises ValueError for another message, ShardMismatchError for parameters that do not match the
    offer, SyncError when the sync does not complete; if it had begun, the parameters then hold a mixture of versions.
    """
    if tensors.keys() != {MESSAGE_NAME}:
        raise ValueError(f"this loader accepts only the tensor {MESSAGE_NAME}, not {', '.join(sorted(tensors))}")
    offer = Offer.read(tensors[MESSAGE_NAME])
    if offer.arch.experts is not None:
        refuse_other_orders(model)
    shards = {name: tensor.data for name, tensor in server_shards(dict(model.named_parameters()), offer).items()}
    key = json.dumps(asdict(replace(offer, version=0)), default=sorted)
    if key not in _open:
        for old in _open.values():
            old.close()
        _open.clear()
        _open[key] = offer.transport(offer.store(), offer.process)
    try:
        _open[key].sync(offer.version, None, shards)
    except BaseException:
        _open.pop(key).close()  # the next offer opens a new one, even at the same address
        raise
    if offer.arch.latent is not None:
        # A worker computes with matrices derived from kv_b_proj; after a custom loader, SGLang does not recompute them.
        model.post_load_weights()

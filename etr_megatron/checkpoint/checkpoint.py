"""Save and load the state of a run: model, optimizer, schedule, RNG and the trainer's state.

`<checkpoints>/step_000025/` is either complete or absent: it is written under a temporary name and renamed last, so a killed
save never damages an older checkpoint. Optimizer state is stored so that another TP, PP or DP layout can load it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as tensors_as_bytes
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from etr_megatron.checkpoint.optimizer_shards import optimizers_of, store_by_rank
from etr_megatron.checkpoint.saving import TorchDistSave, disk_full_anywhere, shared_among_replicas
from etr_megatron.errors import UserError
from etr_megatron.platform.all_ranks import on_all_ranks
from etr_megatron.platform.files import disk_errors, entries, no_room, sync_to_disk
from etr_megatron.policy import Layout, Policy
from etr_megatron.policy.megatron_weights import reason
from etr_megatron.policy.model import PolicyModel
from etr_megatron.policy.replicas import ReadOnce
from etr_megatron.weights import holds_adapters
from etr_megatron.weights.adapter_dir import read_low_rank
from etr_megatron.weights.run_checkpoint import BASE_DTYPE, BASE_SUM, LORA_FILE, TRAINER_FILE

_NAME = re.compile(r"step_(\d{6,})$")
_TORN = (json.JSONDecodeError, UnicodeDecodeError, EOFError, UnpicklingError, SafetensorError, FileNotFoundError)
"""What readers raise for a truncated, corrupt or missing file."""
_TENSORS_FILE = "trainer.safetensors"
"""Tensors of the trainer's state: per-token data of pending groups, which would be gigabytes of JSON."""

_OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_DISTRIBUTED = "distributed_optimizer"


def latest_step(checkpoints: Path) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    steps = saved_steps(checkpoints)
    return steps[-1] if steps else None


def saved_steps(checkpoints: Path) -> list[int]:
    """Steps of all complete checkpoints, in order."""
    if not checkpoints.is_dir():
        return []
    found = (_NAME.match(entry.name) for entry in checkpoints.iterdir() if (entry / TRAINER_FILE).is_file())
    return sorted(int(match[1]) for match in found if match)


def _path(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


@dataclass
class PreparedCheckpoint:
    """The content of a checkpoint, from `prepare`; `write` writes its shards and the trainer's files. files: on rank 0 only."""

    checkpoints: Path
    step: int
    keep: int
    best: Collection[int]
    shards: TorchDistSave
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def temporary(self) -> Path:
        """The folder's name until it is complete."""
        return self.checkpoints / f".step_{self.step:06d}.unfinished"

    def create_folder(self) -> None:
        """Create an empty folder for the checkpoint, and remove those that killed saves have left."""
        with disk_errors(self.checkpoints):
            for leftover in entries(self.checkpoints, ".step_*.unfinished"):
                shutil.rmtree(leftover)
            self.temporary.mkdir(parents=True)

    def write(self, group: dist.ProcessGroup | None = None, barrier: Callable[[], None] = lambda: None) -> None:
        """Write all files, then give the folder its name and remove older checkpoints. A collective of `group` (None: all
        ranks), which has all ranks and must be gloo in a thread. Raises the same errors as `save`, on every rank.

        barrier: called on every rank after its shards are written or have failed.
        """
        with self.errors():
            self.shards.write(self.temporary, group, barrier)
            on_all_ranks(lambda: self._publish() if dist.get_rank() == 0 else None, group)

    def _publish(self) -> None:
        for name, data in self.files.items():
            (self.temporary / name).write_bytes(data)
            sync_to_disk(self.temporary / name)
        final = _path(self.checkpoints, self.step)
        shutil.rmtree(final, ignore_errors=True)
        self.temporary.rename(final)
        sync_to_disk(self.checkpoints)
        for old in set(saved_steps(self.checkpoints)[: -self.keep]).difference(self.best):
            shutil.rmtree(_path(self.checkpoints, old))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the error of a full disk on any rank into a UserError, and remove the partial checkpoint. Turn torch's
        CheckpointException, which is no Exception, into a RuntimeError."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            full = disk_full_anywhere(error)
            if full is None and isinstance(error, CheckpointException):
                raise RuntimeError(f"step {self.step} was not saved: {error}") from error
            if full is None:
                raise
            if dist.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise UserError(
                f"{self.checkpoints}: {no_room(full)} while saving step {self.step}; make room and start again with the same "
                "command: the last complete checkpoint is untouched"
            ) from error


def save(
    checkpoints: Path, step: int, policy: Policy, trainer: dict[str, Any], *, keep: int, best: Collection[int] = ()
) -> None:
    """Write the checkpoint of `step`, and remove others except the last `keep` and those of the steps `best`. A collective.

    step: number of trained steps; at 0 the optimizer has made no step, and its state is not written.
    trainer: the trainer's state, JSON except for the tensors in `trainer["tensors"]`. Only rank 0's `trainer` and `best` count.
    Raises UserError, naming the path, if the disk is full; the partial checkpoint is removed and older ones stay untouched.
    """
    prepare(checkpoints, step, policy, trainer, keep=keep, best=best, snapshot=False).write()


def prepare(
    checkpoints: Path,
    step: int,
    policy: Policy,
    trainer: dict[str, Any],
    *,
    keep: int,
    best: Collection[int] = (),
    snapshot: bool = True,
) -> PreparedCheckpoint:
    """The part of `save` that needs the policy and the trainer. A collective, with the arguments and errors of `save`.

    snapshot: copy the state to host memory. Without it, the policy must not change until `write` has returned.
    """
    prepared = PreparedCheckpoint(checkpoints, step, keep, best, TorchDistSave(copies=snapshot))
    rank0 = dist.get_rank() == 0
    with prepared.errors():
        on_all_ranks(lambda: prepared.create_folder() if rank0 else None)
        base = policy.adapters.base_sum()
        sharded = _sharded_state(policy, loading=False, optimizer=step > 0)
        dist_checkpointing.save(sharded, str(prepared.temporary), sharded_strategy=shared_among_replicas(prepared.shards))
        if rank0:
            state = {"step": step, **_sizes(policy.layout), _DISTRIBUTED: policy.config.train.distributed_optimizer, **trainer}
            files = {_TENSORS_FILE: tensors_as_bytes(state.pop("tensors", {}))}
            if policy.adapters.spec is not None:
                files[LORA_FILE] = json.dumps(policy.adapters.spec.as_json()).encode()
                state |= {BASE_SUM: base, BASE_DTYPE: policy.config.model.dtype}
            prepared.files = {**files, TRAINER_FILE: json.dumps(state).encode()}
    return prepared


def load(checkpoints: Path, step: int, policy: Policy) -> dict[str, Any]:
    """Restore the policy to the state of `step` (in place) and return the trainer's state. A collective.

    Only rank 0 gets the trainer's tensors. The layout may differ from the layout that saved; RNG states then stay as seeded.
    Raises UserError for a checkpoint that does not fit the model or is damaged.
    """
    path = _path(checkpoints, step)
    with _damage_as_user_error(path):
        return _load(path, step, policy)


@contextmanager
def _damage_as_user_error(path: Path) -> Iterator[None]:
    """Turn readers' errors on truncated or corrupt files into a UserError."""
    try:
        yield
    except (*_TORN, ValueError, RuntimeError) as error:
        what = str(error).partition("\n")[0] or type(error).__name__
        # torch.load has no exception class of its own.
        if not isinstance(error, _TORN) and "PytorchStreamReader" not in what and "corrupted" not in what:
            raise
        raise _damaged(path, what) from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged ({what}); remove it to continue from the previous checkpoint")


def _load(path: Path, step: int, policy: Policy) -> dict[str, Any]:
    trainer = json.loads((path / TRAINER_FILE).read_text())
    if not isinstance(trainer, dict):
        raise _damaged(path, f"{TRAINER_FILE} is not a JSON object")
    layout = policy.layout
    same_layout = all(trainer.get(name, size) == size for name, size in _sizes(layout).items())
    _refuse_other_optimizer(path, trainer, policy)
    _refuse_other_adapters(path, trainer, policy)
    wanted = _sharded_state(policy, loading=True, rng=same_layout, optimizer=step > 0)
    if policy.adapters:
        wanted |= _without_other_scales(path, {name: wanted[name] for name in _chunks(policy)})
    try:
        state: Any = dist_checkpointing.load(wanted, str(path), ReadOnce())
    except (CheckpointException, dist_checkpointing.core.CheckpointingException) as error:
        raise UserError(
            f"{path} does not fit this model ({reason(error)}); restore the settings it was made with, choose another "
            "run.name, or remove it if it is damaged"
        ) from error
    for name, chunk in _chunks(policy).items():
        chunk.load_state_dict(state[name], strict=False)
    if step > 0:
        policy.optimizer.load_state_dict(state["optimizer"])
    policy.adapters.merge()
    policy.load_schedule(state["scheduler"])
    if same_layout:
        _restore_rng(state["rng"])
    if layout.rank == 0:
        trainer["tensors"] = load_file(path / _TENSORS_FILE)
    return trainer


def _refuse_other_optimizer(path: Path, trainer: dict[str, Any], policy: Policy) -> None:
    """Refuse a checkpoint whose `train.distributed_optimizer` differs: Megatron would fail midway through loading it."""
    now = policy.config.train.distributed_optimizer
    written = trainer.get(_DISTRIBUTED, now)
    if trainer["step"] > 0 and written != now:
        raise UserError(
            f"{path} was written with train.distributed_optimizer={str(written).lower()}, whose state the other optimizer "
            "cannot read; set that again, or choose another run.name"
        )


def _refuse_other_adapters(path: Path, trainer: dict[str, Any], policy: Policy) -> None:
    """Refuse a checkpoint that holds other adapters, adapters of another model, adapters where all weights are trained, or all
    weights where adapters are trained. A collective."""
    base = policy.adapters.base_sum()
    now = policy.adapters.spec
    written = read_low_rank(path) if holds_adapters(path) else None
    if written == now:
        if now is not None and trainer.get(BASE_SUM) != base:
            raise UserError(
                f"{path} has adapters of another model than {policy.config.model.path} is now with "
                f"model.dtype={policy.config.model.dtype}; restore both, or choose another run.name"
            )
        return
    settings = {"rank": 0} if written is None else written.as_json()
    what = ", ".join(f"lora.{key}={json.dumps(value)}" for key, value in settings.items())
    raise UserError(f"{path} was written with {what}; set that again, or choose another run.name")


def _sizes(layout: Layout) -> dict[str, int]:
    return {name: getattr(layout, name) for name in ("world", "tp", "pp", "ep", "etp", "cp", "vpp")}


def _chunks(policy: Policy) -> dict[str, PolicyModel]:
    """The model chunks by their keys in Megatron's checkpoint."""
    chunks = policy.chunks
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def _sharded_state(policy: Policy, *, loading: bool, optimizer: bool, rng: bool = True) -> dict[str, Any]:
    """Megatron's sharded state. Each sharded tensor carries its offset in the global tensor, so any layout can read it.

    optimizer: whether the optimizer has made a step. Before that, Adam lacks the state that Megatron would read, and there is
    nothing to save: the fp32 weights equal the model's.
    """
    policy.finish_update()
    if policy.adapters:  # all other weights still have their initial values
        adapters = zip(_chunks(policy).items(), policy.adapters.sharded_state_dicts(), strict=True)
        model = {name: found | _scales(policy, chunk) for (name, chunk), found in adapters}
    else:
        model = {name: chunk.sharded_state_dict() for name, chunk in _chunks(policy).items()}
    state: dict[str, Any] = {**model, "scheduler": policy.scheduler.state_dict()}
    if optimizer:
        if policy.config.train.distributed_optimizer:
            _create_adam_state(policy.optimizer)
            store_by_rank(policy.optimizer)
        state["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_OPTIMIZER_METADATA)
    if rng:
        layout = policy.layout
        state["rng"] = ShardedObject("rng", _rng_state(), (layout.world,), (layout.rank,), replica_id=0)
    return state


def _scales(policy: Policy, chunk: PolicyModel) -> dict[str, ShardedObject]:
    """The state of Transformer Engine's delayed scaling, which takes scales from earlier updates; empty with other recipes."""
    if policy.config.fp8.recipe != "delayed":
        return {}
    return {name: part for name, part in chunk.sharded_state_dict().items() if isinstance(part, ShardedObject)}


def _without_other_scales(path: Path, chunks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Remove scales from the chunks' states that the checkpoint lacks because it was written with another FP8 recipe."""
    if not any(isinstance(part, ShardedObject) for state in chunks.values() for part in state.values()):
        return chunks
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name: {key: part for key, part in state.items() if not isinstance(part, ShardedObject) or part.unique_key in stored}
        for name, state in chunks.items()
    }


def _create_adam_state(optimizer: Any) -> None:
    """Create torch Adam's state, which the distributed optimizer reads, although Adam creates it only in its first step."""
    for one in optimizers_of(optimizer):
        inner = one.optimizer
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if isinstance(inner, torch.optim.Adam) and not inner.state[parameter]:
                inner.state[parameter].update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(parameter.data),
                    exp_avg_sq=torch.zeros_like(parameter.data),
                )


def _rng_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])

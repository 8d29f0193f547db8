"""The command line that the launcher and the ranks share: `[[--config] CONFIG] [key=value ...]`."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError
from itertools import combinations
from pathlib import Path

from etr_megatron.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The shipped configs, next to the package in a checkout."""

CPU_CONFIG = "cpu_tiny.yaml"
"""The default config on a machine without a GPU."""

USAGE = """[--rollout-only | --dry-run] [[--config] CONFIG] [key=value ...]

  CONFIG          a YAML file, such as configs/cpu_tiny.yaml (the default on a machine without a GPU)
  key=value       overrides of the config, such as run.name=first train.lr=1e-5
  --rollout-only  generate, reward and record rollouts, without training
  --dry-run       check config, layout, model, data files and memory for GPUs that need not be here; nothing is started. Takes
                  --gpus N [--gpu a100|h100|h200|b200] [--gpu-memory GIB] [--gpus-per-node N]; without --gpus it plans for the
                  fewest that the config fits on"""
"""Arguments of a rank."""

LAUNCHER_USAGE = f"[--nproc N] {USAGE}\n  --nproc N       processes to start on this machine"
"""Arguments of the launcher."""


def parse_args(argv: list[str], usage: str = USAGE) -> tuple[Path, list[str]]:
    """The config file and the overrides on a command line; without a config, `default_config` chooses.

    usage: what the error for an unknown option shows.
    Raises `UserError` for an unknown option, an empty argument or a second config, and when `default_config` does.
    """
    config: str | None = None
    overrides: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("", "--config="):
            raise UserError("an argument is empty, perhaps because a variable is not set; give a config file or key=value")
        if argument == "--config":
            named = next(arguments, None)
            if not named:
                raise UserError("--config must be followed by a config file")
        elif argument.startswith("--config="):
            named = argument.removeprefix("--config=")
        elif argument == "--rollout-only":
            overrides.append("rollout.only=true")
            continue
        elif argument.startswith("-"):
            raise UserError(f"unknown option {argument}; usage: {usage}")
        elif "=" in argument:
            overrides.append(argument)
            continue
        else:
            named = argument
        if config is not None:
            raise UserError(f"two configs are given, {config} and {named}; give one, and overrides as key=value")
        config = named
    if config is not None:
        return Path(config), overrides
    return default_config(cuda=_runs_on_cuda(overrides)), overrides


def last_of_each(overrides: list[str]) -> list[str]:
    """The overrides that count, in order: the last of each key. Prints a note for a key that is given with different values,
    and for an entry of a mapping that is given as a whole after it.

    The example scripts append an override to those of the user, so a repeated key is no mistake.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.partition("=")[0].strip()
        values[key] = [*values.pop(key, []), override]  # a mapping that is given after one of its entries replaces it
    for key, given in values.items():
        if len(set(given)) > 1:
            print(f"note: {key} is given {len(given)} times on the command line; the last counts: {given[-1]}", file=sys.stderr)
    for replaced, mapping in combinations(values, 2):
        if replaced.startswith(f"{mapping}."):
            print(f"note: {replaced} on the command line has no effect: {values[mapping][-1]} comes after it", file=sys.stderr)
    return [given[-1] for given in values.values()]


def given_path(text: str) -> Path:
    """Argparse type for a path; rejects the empty string, which would mean the working directory."""
    if not text:
        raise ArgumentTypeError("it is empty, perhaps because a variable is not set")
    return Path(text)


def asks_for_help(argv: list[str]) -> bool:
    """Whether -h or --help is among the arguments."""
    return not {"-h", "--help"}.isdisjoint(argv)


def require_torchrun(module: str) -> None:
    """Raise `UserError` in a process that torchrun did not start. module: the module that was run with `python -m`."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"{missing[0]} is not set: python -m {module} runs a single rank; start it with torchrun --nproc-per-node N -m "
            f"{module}" + (", or the whole job with bash examples/run_etr.sh" if module.endswith(".train") else "")
        )


def default_config(cuda: bool) -> Path:
    """The config for a command line without one: the CPU config. There is no sensible default for CUDA.

    Raises `UserError` with a list of the shipped configs if `cuda`, and `UserError` if the CPU config does not exist.
    """
    if cuda:
        listing = "\n".join(f"  {path}  {_first_comment(path)}" for path in sorted(CONFIGS.glob("*.yaml")))
        raise UserError(f"no CONFIG is given and this machine has a GPU; give one of\n{listing}")
    path = CONFIGS / CPU_CONFIG
    if not path.is_file():
        raise UserError(f"no CONFIG is given and the default {path} does not exist; give a config file")
    return path


def _runs_on_cuda(overrides: list[str]) -> bool:
    platforms = [override.partition("=")[2] for override in overrides if override.startswith("run.platform=")]
    if platforms and platforms[-1] == "cpu":
        return False
    import torch  # slow to import, and needed only when no config is named

    return torch.cuda.is_available()


def _first_comment(path: Path) -> str:
    first = path.read_text().partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""

"""Does the clip range matter? Presets of the objective on the tiny arithmetic task, from one warm start, seed by seed.

    python -m benchmarks.etr_vs_grpo             # 5 presets x 7 seeds x 60 steps: about an hour on two cores
    python -m benchmarks.etr_vs_grpo --quick     # 3 presets x 2 seeds x 20 steps: minutes

Run it from the root of the checkout. If it is stopped, the same command continues: finished runs are kept, the others resume
from their last checkpoint. Output files and their meaning: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from benchmarks.experiment_analysis import VOID_BELOW, analyse, analyse_run
from benchmarks.experiment_environment import environment
from benchmarks.experiment_report import require_matplotlib, write_report
from benchmarks.experiment_runs import (
    REPO,
    Experiment,
    Run,
    keep_record,
    only_user,
    read_record,
    run_all,
    shared_settings,
)
from etr_megatron.config import PRESETS
from etr_megatron.errors import UserError

BASELINE = "grpo"
OVERRIDES = (
    # 1.5x the config's: if hardly any token is clipped, there is nothing to compare.
    "train.lr=3.0e-4",
    # Sampled, as in training, so that the curve keeps rising. 512 problems: a standard error of at most 2.2%.
    "eval.every=5",
    "eval.temperature=1.0",
    "eval.problems=512",
    "arithmetic.eval_problems=512",
    "run.platform=cpu",
    "parallel.tp=1",
    # A killed run loses at most 20 steps.
    "checkpoint.every=20",
    "checkpoint.keep=1",
    "observe.tensorboard=false",
    "observe.rollouts_every=0",
)
RESERVED = ("run.name", "run.dir", "run.seed", "run.steps", "objective.preset")


@dataclass(frozen=True)
class Size:
    """Defaults of the options."""

    presets: str
    seeds: int
    steps: int
    name: str


FULL = Size("grpo,dapo,etr,etr_second_order,etr_matched", 7, 60, "etr_vs_grpo")
QUICK = Size("grpo,etr,etr_matched", 2, 20, "etr_vs_grpo_quick")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


@dataclass(frozen=True)
class Options:
    """The validated command line."""

    presets: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    jobs: int
    runs_dir: Path
    out: Path
    report_only: bool
    overrides: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """Ordered by seed, so that the runs finished at any moment can be compared."""
        return [Run(preset, seed) for seed in self.seeds for preset in self.presets]


def parse(argv: list[str]) -> Options:
    """Parse the command line. Raises `UserError`, one sentence, for invalid arguments."""
    parser = _Parser(prog="python -m benchmarks.etr_vs_grpo", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.presets} x {QUICK.seeds} seeds x {QUICK.steps} steps")
    parser.add_argument("--presets", help=f"comma-separated, {BASELINE} among them (default {FULL.presets})")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"seeds 1 to N (default {FULL.seeds})")
    parser.add_argument("--steps", type=int, metavar="N", help=f"rollout steps of a run (default {FULL.steps})")
    parser.add_argument("--jobs", type=int, metavar="N", default=2, help="runs at a time, one thread each (default 2)")
    parser.add_argument("--runs-dir", type=Path, help="where the runs are kept (default runs/etr_vs_grpo)")
    parser.add_argument("--out", type=Path, help="the result; .md and .png go beside it (default benchmarks/results/...json)")
    parser.add_argument("--report-only", action="store_true", help="start nothing, analyse the runs that are there")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs, as for the main job")
    given = parser.parse_intermixed_args(argv)
    size = QUICK if given.quick else FULL
    if given.report_only and (given.steps is not None or given.overrides):
        raise UserError("--report-only starts nothing: leave out --steps and key=value, the runs have theirs")
    for name in ("seeds", "steps", "jobs"):
        number = getattr(given, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} {number}: must be at least 1")
    return Options(
        presets=_presets(size.presets if given.presets is None else given.presets),
        seeds=tuple(range(1, (given.seeds or size.seeds) + 1)),
        steps=given.steps or size.steps,
        jobs=given.jobs,
        runs_dir=(given.runs_dir or REPO / "runs" / size.name).resolve(),
        out=_out(given.out or REPO / "benchmarks" / "results" / f"{size.name}.json"),
        report_only=given.report_only,
        overrides=_overrides(given.overrides),
    )


def _presets(names: str) -> tuple[str, ...]:
    presets = tuple(names.split(","))
    for preset in presets:
        if preset not in PRESETS:
            raise UserError(f"--presets: {preset!r} is not a preset; there are {', '.join(PRESETS)}")
    if len(set(presets)) < len(presets):
        raise UserError(f"--presets {names}: a preset is named twice")
    if BASELINE not in presets:
        raise UserError(f"--presets {names}: must contain {BASELINE}, with which the others are compared")
    return presets


def _out(path: Path) -> Path:
    if path.suffix != ".json":
        raise UserError(f"--out {path}: must end in .json")
    return path.resolve()


def _overrides(given: list[str]) -> tuple[str, ...]:
    for override in given:
        if "=" not in override:
            raise UserError(f"{override!r}: must be key=value, such as train.lr=1e-4")
        if override.split("=")[0] in RESERVED:
            raise UserError(f"{override}: is set by the experiment itself; see --presets, --seeds, --steps and --runs-dir")
    return tuple(given)


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 if a run failed or is missing; 2 for a user's mistake; 128 + n after signal n."""
    try:
        options = parse(sys.argv[1:] if argv is None else argv)
        require_matplotlib()
        if not options.report_only:
            _run(options)
        return 0 if _report(options) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(options: Options) -> None:
    """Make the shared warm start, then start missing runs; prints how each run ended, and why if it failed."""
    from etr_megatron.data import build_tiny_policy  # imports torch: only after the arguments are checked

    settings = {one.partition("=")[0]: one for one in OVERRIDES + options.overrides}  # the user's replace ours
    experiment = Experiment(options.runs_dir, options.steps, tuple(settings.values()))
    for preset in options.presets:
        config = experiment.config(Run(preset, options.seeds[0]))
    if config.data.eval is None or not config.eval.every:
        raise UserError("data.eval and eval.every must stay on: held-out accuracy is what is compared")
    with only_user(options.runs_dir):
        keep_record(options.runs_dir, shared_settings(config), environment(REPO))
        todo = [run for run in options.runs if not experiment.is_finished(run)]
        _say(
            f"{len(options.runs)} runs, {len(options.runs) - len(todo)} of them finished before; they are in {options.runs_dir}"
        )
        if todo and config.model.path == "tiny":
            tiny = replace(config.tiny, cache_dir=str(REPO / config.tiny.cache_dir))  # where the runs look for it
            build_tiny_policy(tiny, config.arithmetic, progress=sys.stderr.isatty())
        failures = run_all(experiment, todo, options.jobs, _say)
    for failure in failures:
        _say(f"\n{failure.run.name} ended with exit code {failure.exit_code}; its last lines:\n{failure.last_lines}")


def _report(options: Options) -> bool:
    """Analyse the runs in the directory, write and print the report; returns whether all runs are there."""
    record = read_record(options.runs_dir)
    if record is None:
        raise UserError(f"--runs-dir {options.runs_dir} holds no experiment: run one first, without --report-only")
    steps = record["settings"]["run.steps"]
    experiment = Experiment(options.runs_dir, steps)
    results = [analyse_run(run, experiment.rows(run), steps) for run in options.runs]
    result = {
        "baseline": BASELINE,
        "seeds": options.seeds,
        "void_below": VOID_BELOW,
        **record,
        **analyse(results, BASELINE),
    }
    _say("\n" + write_report(options.out, result, results) + f"\nwritten: {options.out}, and .md and .png beside it")
    return all(one.state != "missing" for one in results)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())

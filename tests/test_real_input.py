"""Problems from a file and a policy from a directory, in both ways of starting a job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from etr_megatron.config import load_config
from etr_megatron.data import build_tiny_policy
from etr_megatron.errors import UserError
from etr_megatron.job import _stop_ids
from tests import warm
from tests.runs import REPO

ROWS = [
    {"question": f"A box holds {n} apples and {n} pears. How many pieces of fruit are in {n} boxes?",
     "answer": f"Each holds {n}+{n}=<<{n}+{n}={2 * n}>>{2 * n} pieces.\n#### {2 * n * n}"}
    for n in range(2, 14)
]  # fmt: skip


@pytest.fixture
def problems(tmp_path):
    """A GSM8K-like file with a row that is not JSON and one whose prompt is too long."""
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(3, "{not json")
    lines.insert(5, json.dumps({"question": "long " * 900, "answer": "#### 1"}))
    file = tmp_path / "problems.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def model(runs, tmp_path):
    """A HuggingFace directory independent of `tiny`: a copy of the small policy."""
    config = load_config(runs.config, runs.command()[4:])
    copy = tmp_path / "model"
    shutil.copytree(build_tiny_policy(config.tiny, config.arithmetic, progress=False), copy)
    return copy


@pytest.mark.slow
def test_a_jsonl_file_and_a_model_directory_run_the_whole_loop(runs, problems, model):
    gsm8k = REPO / "configs" / "gsm8k.yaml"
    command = [sys.executable, "-m", "etr_megatron.launch", str(gsm8k), f"data.train={problems}", f"model.path={model}"]
    command += [f"run.dir={runs.folder / 'runs'}", "run.steps=2", "parallel.tp=1", "data.on_bad_row=skip"]
    sets = f"data.eval={{fruit: {problems}, sums: arithmetic}}"
    command += [
        *("rollout.prompts_per_step=4", "rollout.max_response_tokens=16", "eval.max_response_tokens=64"),
        *(sets, "eval.problems=5", "arithmetic.eval_problems=7"),
    ]
    process = warm.start(command, {**os.environ})
    _, printed = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "data.train: 12 problems; left out 1 over data.max_prompt_tokens=512 and 1 broken rows" in printed
    rows = runs.rows("gsm8k")
    assert [row["step"] for row in rows] == [1, 2]
    for end, row in (("_start", rows[0]), ("", rows[-1])):
        assert row[f"eval/fruit/accuracy{end}"] == 0.0 and row[f"eval/sums/accuracy{end}"] == 2 * row[f"eval_accuracy{end}"]
        assert row[f"eval_response_tokens_mean{end}"] > 16
    evaluations = runs.directory("gsm8k") / "evaluations"
    assert sorted(path.name for path in evaluations.iterdir()) == ["step_000000.jsonl", "step_000002.jsonl"]
    asked = [json.loads(line)["problem"] for line in (evaluations / "step_000002.jsonl").read_text().splitlines()]
    assert asked[:4] == [f"fruit/problems.jsonl:{line}" for line in (1, 2, 3, 5)] and asked[4].startswith("sums/arithmetic:")
    sample = json.loads((runs.directory("gsm8k") / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    assert "apples" in sample["prompt"] and "\\boxed{}" in sample["prompt"] and "####" in sample["answer"]


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["rollout.stop_tokens=['1', '2', '<|endoftext|>']", "rollout.stop_strings=['1', '2']"])
def test_stop_tokens_and_strings_end_responses_besides_the_models_own_tokens(runs, ends):
    """Without them, responses of the small policy have other tokens behind a 1 or 2."""
    overrides = (
        "run.name=stops",
        "parallel.tp=1",
        "run.steps=1",
        "eval.every=1",
        "eval.temperature=1",
        "observe.rollouts_groups=8",
    )
    code, printed = runs.finish(*overrides, ends)
    assert code == 0, printed
    for folder, file in (("rollouts", "step_000001.jsonl"), ("evaluations", "step_000000.jsonl")):
        lines = (runs.directory("stops") / folder / file).read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        stopped = [sample for sample in samples if sample["response"][-1:] in ("1", "2")]
        assert stopped and all(sample["finish_reason"] == "stop" for sample in stopped)
        assert not any(digit in sample["response"][:-1] for sample in samples for digit in "12")


def test_a_stop_token_that_the_tokenizer_has_not_as_one_is_refused(runs, model):
    code, printed = runs.finish(f"model.path={model}", "rollout.stop_tokens=[<|im_end|>, so not]")
    assert code == 2 and "Traceback" not in printed
    assert "error: rollout.stop_tokens: 'so not' is not a token of the model's tokenizer; name single tokens" in printed


def test_a_stop_token_that_the_vocabulary_lacks_is_not_taken_for_the_unknown_token(tmp_path):
    words = models.WordLevel({"<unk>": 0, "end": 1, "stop": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="end", unk_token="<unk>")
    assert _stop_ids(tmp_path, tokenizer, ["stop", "<unk>"]) == {0, 1, 2}
    with pytest.raises(UserError, match="'stpo' is not a token of the model's tokenizer"):
        _stop_ids(tmp_path, tokenizer, ["stpo"])


@pytest.mark.parametrize(("eos", "shown"), [("x", '"x"'), (True, "true"), ([1, None, 2.0], "[1, null, 2.0]")])
def test_ids_that_end_a_sequence_and_are_none_are_one_sentence(tmp_path, eos, shown):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"end": 0}, unk_token="end")), eos_token="end"
    )
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError) as caught:
        _stop_ids(tmp_path, tokenizer, [])
    assert str(caught.value) == f"{file}: eos_token_id must be a token id or a list of token ids, not {shown}"


def test_a_broken_row_stops_the_job_with_file_and_line(runs, problems, model):
    code, printed = runs.finish(f"data.train={problems}", f"model.path={model}")
    assert code == 2 and "Traceback" not in printed
    assert f"problems.jsonl:4 of '{problems}'" in printed and "data.on_bad_row=skip" in printed


def larger_vocabulary(content):
    """As from another model: the token of a digit has no embedding in this one."""
    content["model"]["vocab"]["1"] = 70_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "spoil", "sentence"),
    [
        ("tokenizer.json", larger_vocabulary, "the tokenizer produces token id 70000 for a prompt, but the model has "),
        ("config.json", lambda content: content.update(pad_token_id=70_000), "transformers cannot build the model of "),
    ],
    ids=["tokenizer", "config"],
)
def test_files_of_a_model_that_do_not_fit_it_are_one_sentence(runs, model, file, spoil, sentence):
    content = json.loads((model / file).read_text())
    spoil(content)
    (model / file).write_text(json.dumps(content))
    code, printed = runs.finish(f"model.path={model}", f"run.name={file}")
    assert code == 2 and "Traceback" not in printed
    assert printed.count("error: ") == 1 and str(model) in printed and sentence in printed


@pytest.mark.slow
def test_plain_torchrun_runs_the_script_on_one_process(runs):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*torchrun, "examples/run_etr.sh", *runs.command("run.steps=2", "run.name=plain", "eval.every=0")[3:]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in runs.rows("plain")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mistake"),
    [
        (3, "parallel.tp=2"),  # every rank sees it
        (2, "reward.function=tests.late_mistake:none"),  # the first rank sees it while the other already waits for it
    ],
)
def test_plain_torchrun_prints_a_mistake_once_and_does_not_have_to_kill_a_rank_that_waits(runs, processes, mistake):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*torchrun, "examples/run_etr.sh", *runs.command(mistake, "run.stop_grace_s=900")[3:]]
    process = warm.start(command, {**os.environ}, spares=1)
    _, printed = process.communicate(timeout=600)
    assert process.returncode == 1 and "SIGKILL" not in printed
    assert printed.count("error: ") == 1 and mistake.split("=")[0] in printed

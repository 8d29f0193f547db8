from __future__ import annotations

import copy
import dataclasses
import errno
import fcntl
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from etr_megatron.config import sources_of
from etr_megatron.config.rules.inputs import TINY_POSITIONS
from etr_megatron.config.schema import ArithmeticConfig, Config, DataConfig, TinyConfig
from etr_megatron.data import build_tiny_policy, load_tokenizer, open_problems
from etr_megatron.data import tiny as tiny_module
from etr_megatron.data import warm_start as warm_start_module
from etr_megatron.data.arithmetic import Slips, demonstration, warm_start_exercises
from etr_megatron.data.tiny import tiny_policy_path
from etr_megatron.data.warm_start import new_model, train_tokenizer, warm_start
from etr_megatron.errors import UserError
from etr_megatron.job import initial_checkpoint
from tests import warm
from tests.runs import wait_for

ARITHMETIC = ArithmeticConfig(min_digits=1, max_digits=1, train_problems=20, eval_problems=5)
SMALL = TinyConfig(
    hidden_size=40,
    layers=2,
    heads=4,
    head_dim=12,
    intermediate_size=72,
    warm_start_steps=4,
    warm_start_batch=8,
)
TEXTS = ["What is 47+385?", "Größe \\frac{1}{2} — 東京 🙂\n\n  two  spaces", "a\tb\r\nI've 1,234.50 $", "<|im_end|>"]


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    return build_tiny_policy(replace(SMALL, cache_dir=str(tmp_path_factory.mktemp("cache"))), ARITHMETIC, progress=False)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_the_policy_loads_as_qwen3_with_distinct_dimensions(policy):
    model = AutoModelForCausalLM.from_pretrained(policy)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layer = "model.layers.1."
    assert model.config.model_type == "qwen3"
    assert shapes[layer + "self_attn.q_proj.weight"] == (48, 40)
    assert shapes[layer + "self_attn.k_proj.weight"] == (24, 40)
    assert shapes[layer + "self_attn.q_norm.weight"] == (12,)
    assert shapes[layer + "mlp.down_proj.weight"] == (40, 72)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (len(AutoTokenizer.from_pretrained(policy)), 40)
    assert not model.config.tie_word_embeddings
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_other_readers_of_its_directory_find_what_they_expect_there(policy):
    config, generation = (json.loads((policy / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]  # servers choose the model by it
    assert generation["eos_token_id"] == load_tokenizer(policy).eos_token_id
    with safe_open(policy / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # older transformers refuse files without it


def test_the_policy_says_what_it_was_made_from_and_how_far_it_came(policy):
    made_from = json.loads((policy / "warm_start.json").read_text())
    assert made_from["settings"]["tiny.intermediate_size"] == 72 and made_from["settings"]["arithmetic.max_digits"] == 1
    assert 1 < made_from["last_loss_nats_per_token"] < math.log(TinyConfig.vocab_size) + 1


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_reloaded_tokenizer(policy, text):
    tokenizer = load_tokenizer(policy)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_encodes_alike_when_rebuilt_as_qwen2_tokenizer(policy, text):
    saved = json.loads((policy / "tokenizer.json").read_text())["model"]
    rebuilt = Qwen2Tokenizer(vocab=saved["vocab"], merges=[tuple(pair) for pair in saved["merges"]], eos_token="<|im_end|>")
    assert rebuilt.encode(text) == AutoTokenizer.from_pretrained(policy).encode(text)


def test_digits_are_single_tokens_and_special_tokens_agree_with_the_model(policy):
    tokenizer = load_tokenizer(policy)
    assert len(tokenizer.encode("9876543210")) == 10
    model = AutoModelForCausalLM.from_pretrained(policy)
    config = model.config
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id and config.bos_token_id is None
    assert config.max_position_embeddings == tokenizer.model_max_length == TINY_POSITIONS
    assert config.initializer_range == pytest.approx(40**-0.5)


def test_prompts_of_the_run_are_templated_with_the_chat_template(policy):
    tokenizer = load_tokenizer(policy)
    config = DataConfig(system_prompt="Add.")
    problem = open_problems(sources_of(config)[0], config, ARITHMETIC, tokenizer)[0]
    assert tokenizer.decode(problem.prompt_ids) == (
        f"<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{problem.prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_warm_start_learns_to_end_a_boxed_solution():
    tiny = replace(SMALL, warm_start_steps=120, warm_start_batch=16, forgotten_carry=0.0, wrong_digit=0.0)
    tokenizer = train_tokenizer(tiny, ARITHMETIC)
    torch.manual_seed(0)
    model = new_model(tiny, tokenizer)
    solution = tokenizer.encode("3+4=7\n\\boxed{7}<|im_end|>")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3+4?"}], add_generation_prompt=True, return_dict=False
    )

    def solution_loss() -> float:
        labels = torch.tensor([[-100] * len(prompt) + solution])
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompt + solution]), labels=labels).loss.item()

    before = solution_loss()
    warm_start(model, tokenizer, tiny, ARITHMETIC, progress=False)
    assert before > 4.0
    assert solution_loss() < 1.0


def test_the_learning_rate_rises_over_a_twentieth_and_falls_as_a_cosine_to_zero():
    shares = [warm_start_module._lr_share(step, 100) for step in range(101)]
    assert shares[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert shares[5:] == pytest.approx([math.cos(math.pi * step / 95 / 2) ** 2 for step in range(96)])
    assert warm_start_module._lr_share(0, 1) == 1.0


def test_a_batch_is_learnt_from_the_solutions_and_their_ends_alone():
    tokenizer = train_tokenizer(SMALL, ARITHMETIC)
    pairs = [("What is 3+4?", "7"), ("What is 3+4+5?", "3+4=7, 12")]
    input_ids, labels = warm_start_module._batch(pairs, tokenizer)
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for (question, solution), ids, wanted in zip(pairs, input_ids, labels, strict=True):
        prompt, answer = (tokenizer.encode(text) for text in (turn.format(question), f"{solution}<|im_end|>"))
        padding = len(ids) - len(prompt) - len(answer)
        assert ids.tolist() == prompt + answer + [tokenizer.pad_token_id] * padding
        assert wanted.tolist() == [-100] * len(prompt) + answer + [-100] * padding
    assert padding == 0  # the last is the longest


def test_demonstrations_have_each_slip_as_often_as_is_asked_for():
    tiny, slips = replace(SMALL, forgotten_carry=1.0, wrong_digit=0.0), Slips(forgotten_carry=1.0, wrong_digit=0.0)
    arithmetic = replace(ARITHMETIC, max_digits=2)
    exercises, rng = warm_start_exercises(arithmetic, tiny.warm_start_seed), random.Random(tiny.warm_start_seed)
    wanted = [(one.question, demonstration(one, slips, rng)) for one in itertools.islice(exercises, 30)]
    assert list(itertools.islice(warm_start_module._demonstrations(tiny, arithmetic), 30)) == wanted


def test_the_warm_start_is_adamw_with_clipped_gradients_of_each_batch_alone():
    tiny = replace(SMALL, warm_start_steps=3)
    tokenizer = train_tokenizer(tiny, ARITHMETIC)
    model = new_model(tiny, tokenizer)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(reference.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    demonstrations = warm_start_module._demonstrations(tiny, ARITHMETIC)
    for share in (1.0, 1.0, math.cos(math.pi / 4) ** 2):
        batch = list(itertools.islice(demonstrations, tiny.warm_start_batch))
        input_ids, labels = warm_start_module._batch(batch, tokenizer)
        logits = reference(input_ids=input_ids).logits[:, :-1].flatten(0, 1)
        gradients = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()), reference.parameters()
        )
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > 1  # so that clipping has an effect
        for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
            parameter.grad = gradient / norm
        optimizer.param_groups[0]["lr"] = share * tiny.warm_start_lr
        optimizer.step()
    warm_start(model, tokenizer, tiny, ARITHMETIC, progress=False)
    for found, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("progress", "printed"), [(True, "warm start of the tiny policy: 2 steps\n"), (False, "")])
def test_a_log_gets_one_line_of_the_warm_start_and_no_bar(capsys, progress, printed):
    tiny = replace(SMALL, warm_start_steps=2)
    tokenizer = train_tokenizer(tiny, ARITHMETIC)
    warm_start(new_model(tiny, tokenizer), tokenizer, tiny, ARITHMETIC, progress=progress)
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("rank", ["0", "1"])
def test_whichever_rank_builds_shows_it(tmp_path, monkeypatch, capsys, rank):
    monkeypatch.setenv("LOCAL_RANK", rank)
    config = Config(tiny=replace(SMALL, cache_dir=str(tmp_path)), arithmetic=ARITHMETIC)
    initial_checkpoint(config)
    assert capsys.readouterr().err.count("warm start of the tiny policy: 4 steps\n") == 1


def test_the_same_settings_give_the_same_weights_and_leave_the_caller_as_he_was(tmp_path, policy):
    torch.set_num_threads(2)
    torch.manual_seed(11)
    expected_draw = torch.rand(3)
    torch.manual_seed(11)
    again = build_tiny_policy(replace(SMALL, cache_dir=str(tmp_path / "a" / "cache")), ARITHMETIC, progress=False)
    assert torch.equal(torch.rand(3), expected_draw)
    assert torch.get_num_threads() == 2
    first, second = state_of(policy), state_of(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (again / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()


def test_another_seed_begins_with_other_weights(tmp_path, policy):
    tiny = replace(SMALL, cache_dir=str(tmp_path), warm_start_seed=SMALL.warm_start_seed + 3)
    name = "model.layers.1.self_attn.q_proj.weight"  # in a few steps of the warm start it moves by 0.01
    first, second = (state_of(path)[name] for path in (policy, build_tiny_policy(tiny, ARITHMETIC, progress=False)))
    assert (first - second).abs().mean() > 0.1


def test_a_finished_build_is_reused_and_other_settings_build_another(policy):
    tiny = replace(SMALL, cache_dir=str(policy.parent))
    stamp = (policy / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_policy(tiny, ARITHMETIC, progress=False) == policy
    assert build_tiny_policy(tiny, replace(ARITHMETIC, train_problems=7, seed=5), progress=False) == policy
    assert (policy / "model.safetensors").stat().st_mtime_ns == stamp
    assert build_tiny_policy(replace(tiny, warm_start_steps=1), ARITHMETIC, progress=False) != policy
    assert build_tiny_policy(tiny, replace(ARITHMETIC, operators=("-",)), progress=False) != policy


BUILD = """
import sys
from dataclasses import replace
from etr_megatron.data import build_tiny_policy, tiny
from TESTS import ARITHMETIC, SMALL

def counted(*args, **kwargs):
    print("warm start")
    return warm_start(*args, **kwargs)

warm_start, tiny.warm_start = tiny.warm_start, counted
settings = replace(SMALL, cache_dir=sys.argv[1], warm_start_steps=int(sys.argv[2]))
print(build_tiny_policy(settings, ARITHMETIC, progress=False))
"""


def start_build(cache: Path, steps: int, prelude: str = "") -> subprocess.Popen[str] | warm.Process:
    program = prelude + BUILD.replace("TESTS", __name__)
    return warm.start([sys.executable, "-c", program, str(cache), str(steps)], {**os.environ})


@pytest.mark.slow
def test_two_processes_that_build_at_once_build_once(tmp_path):
    both = [start_build(tmp_path, 20) for _ in range(2)]
    printed = [process.communicate(timeout=900)[0].split("\n")[:-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(map(len, printed)) == [1, 2]  # the one that builds prints "warm start" first
    finished = Path(printed[0][-1])
    assert printed[1][-1] == str(finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == [finished.name, finished.name + ".lock"]


@pytest.mark.slow
def test_a_killed_build_is_not_taken_for_a_finished_one(tmp_path):
    killed = start_build(tmp_path, 100_000)
    wait_for(lambda: any(tmp_path.glob("*.partial")))
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    (partial,) = tmp_path.glob("*.partial")
    assert not partial.with_suffix("").exists()
    tiny = replace(SMALL, cache_dir=str(tmp_path))
    finished = build_tiny_policy(tiny, ARITHMETIC, progress=False, timeout_s=300)
    assert state_of(finished)


def test_what_a_killed_build_of_the_same_settings_left_is_replaced(tmp_path, policy):
    left = tmp_path / f"{policy.name}.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (left / "stray").write_text("")
    finished = build_tiny_policy(replace(SMALL, cache_dir=str(tmp_path)), ARITHMETIC, progress=False)
    assert finished.name == policy.name
    assert not left.exists()
    assert not (finished / "stray").exists()
    assert state_of(finished)


def test_a_policy_that_another_process_finishes_meanwhile_is_used(tmp_path, policy, monkeypatch):
    tiny, (name, waits) = replace(SMALL, cache_dir=str(tmp_path)), (policy.name, [])
    monkeypatch.setattr(tiny_module, "warm_start", None)  # it is not built again
    with (tmp_path / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                shutil.copytree(policy, tmp_path / name)
                fcntl.flock(lock, fcntl.LOCK_UN)

        monkeypatch.setattr(tiny_module.time, "sleep", sleep)
        assert build_tiny_policy(tiny, ARITHMETIC, progress=False, timeout_s=60) == tmp_path / name
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert build_tiny_policy(tiny, ARITHMETIC, progress=False, timeout_s=0) == tmp_path / name  # needs no lock
    assert len(waits) == 2 and min(waits) >= 0.1


def test_what_the_policy_is_made_of_and_nothing_else_decides_which_one_it_is(monkeypatch):
    path = tiny_policy_path(SMALL, ARITHMETIC)
    changed = {
        name: tiny_policy_path(replace(SMALL, **{name: value + type(value)(1)}), ARITHMETIC)
        for name, value in dataclasses.asdict(SMALL).items()
        if name != "cache_dir"
    }
    of_problems = {"min_digits": 2, "max_digits": 2, "operators": ("+", "-")}
    changed |= {name: tiny_policy_path(SMALL, replace(ARITHMETIC, **{name: value})) for name, value in of_problems.items()}
    elsewhere = tiny_policy_path(replace(SMALL, cache_dir="elsewhere"), ARITHMETIC)
    assert elsewhere == Path("elsewhere", path.name)
    for name in ("train_problems", "eval_problems", "seed"):
        assert tiny_policy_path(SMALL, replace(ARITHMETIC, **{name: 77})) == path
    monkeypatch.setattr(tiny_module, "_RECIPE", tiny_module._RECIPE + 1)
    changed["recipe"] = tiny_policy_path(SMALL, ARITHMETIC)
    assert len({path, *changed.values()}) == 1 + len(changed)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            SafetensorError("No space left on device (os error 28)"),
            "(No space left on device (os error 28)): free space there or",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), "(Permission denied): name"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "(No space left on device): free space there or name"),
    ],
    ids=["weights", "foreign", "full"],
)
def test_a_cache_that_cannot_be_written_is_refused_with_what_to_do(tmp_path, monkeypatch, error, told):
    monkeypatch.setattr(tiny_module, "_build", mock.Mock(side_effect=error))
    with pytest.raises(UserError) as caught:
        build_tiny_policy(replace(SMALL, cache_dir=str(tmp_path)), ARITHMETIC, progress=False)
    assert str(caught.value).startswith(f"tiny.cache_dir '{tmp_path}' cannot hold the tiny policy {told}")
    assert str(caught.value).endswith(" name another directory")


def test_a_build_that_fails_leaves_the_caller_its_threads_and_the_lock_to_others(tmp_path, monkeypatch):
    torch.set_num_threads(2)
    tiny = replace(SMALL, cache_dir=str(tmp_path))
    for _ in range(2):
        monkeypatch.setattr(tiny_module, "warm_start", mock.Mock(side_effect=ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            build_tiny_policy(tiny, ARITHMETIC, progress=False, timeout_s=0)
        assert torch.get_num_threads() == 2
    assert not tiny_policy_path(tiny, ARITHMETIC).exists()


def test_waiting_for_another_builder_ends_with_a_sentence(tmp_path, policy):
    with (tmp_path / f"{policy.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=rf"for more than 0\.5 s \(it holds .*{policy.name}\.lock\).*tiny\.cache_dir"):
            build_tiny_policy(replace(SMALL, cache_dir=str(tmp_path)), ARITHMETIC, progress=False, timeout_s=0.5)


def test_a_cache_that_cannot_be_made_is_refused_by_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"tiny\.cache_dir .*cannot hold the tiny policy \(Not a directory\)"):
        build_tiny_policy(replace(SMALL, cache_dir=str(tmp_path / "file" / "cache")), ARITHMETIC, progress=False)


@pytest.mark.slow
def test_a_disk_without_room_for_the_weights_is_refused_by_key_and_leaves_no_policy(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    failed = start_build(tmp_path, 1, prelude=limit)
    _, complaint = failed.communicate(timeout=600)
    assert failed.returncode == 1
    assert "etr_megatron.errors.UserError: tiny.cache_dir" in complaint
    assert "cannot hold the tiny policy" in complaint
    assert {path.suffix for path in tmp_path.iterdir()} <= {".partial", ".lock"}

"""The tiny policy: its tokenizer, its architecture, and the supervised warm start on demonstrations with errors."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from etr_megatron.config.rules.inputs import TINY_POSITIONS
from etr_megatron.config.schema import ArithmeticConfig, DataConfig, TinyConfig
from etr_megatron.data.arithmetic import Slips, demonstration, warm_start_exercises
from etr_megatron.data.prompts import conversation, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

PAD_TOKEN, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_TOKENIZER_EXERCISES = 2000
_WARMUP_SHARE = 0.05

# transformers maps `model_type: qwen3` to Qwen2Tokenizer, which rebuilds normalizer and pre-tokenizer itself and keeps
# only vocabulary and merges. With Qwen2's own rules (split every digit, then bytes) both ways of loading agree.
_QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(tiny: TinyConfig, arithmetic: ArithmeticConfig) -> PreTrainedTokenizerBase:
    """A byte-level BPE (encodes any text) with one token per digit and merges learned from the warm start's texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in (PAD_TOKEN, TURN_START, TURN_END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sources = itertools.islice(warm_start_exercises(arithmetic, tiny.warm_start_seed), _TOKENIZER_EXERCISES)
    rng = random.Random(tiny.warm_start_seed)
    texts = (f"{exercise.question}\nassistant\n{demonstration(exercise, Slips(), rng)}" for exercise in sources)
    tokenizer.train_from_iterator((f"system\nuser\n{text}" for text in texts), trainer)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD_TOKEN,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=TINY_POSITIONS,
    )


def new_model(tiny: TinyConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights from torch's global generator: QK norm, grouped-query attention, untied embeddings, fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=tiny.hidden_size,
            intermediate_size=tiny.intermediate_size,
            num_hidden_layers=tiny.layers,
            num_attention_heads=tiny.heads,
            num_key_value_heads=tiny.heads // 2,
            head_dim=tiny.head_dim,
            max_position_embeddings=TINY_POSITIONS,
            initializer_range=tiny.hidden_size**-0.5,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tiny: TinyConfig,
    arithmetic: ArithmeticConfig,
    *,
    progress: bool,
) -> float | None:
    """Supervised training on demonstrations, in place: AdamW, linear warmup then cosine to zero, loss only on the solution.

    Returns the mean loss (nats per solution token) of the last step, or None without steps.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny.warm_start_lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, tiny.warm_start_steps))
    demonstrations = _demonstrations(tiny, arithmetic)
    loss_value = None
    model.train()
    what = "warm start of the tiny policy"
    if progress and not sys.stderr.isatty():  # a log gets one line, not a bar drawn hundreds of times
        print(f"{what}: {tiny.warm_start_steps} steps", file=sys.stderr, flush=True)
    with tqdm(total=tiny.warm_start_steps, desc=what, disable=None if progress else True, dynamic_ncols=True) as bar:
        for _ in range(tiny.warm_start_steps):
            input_ids, labels = _batch(list(itertools.islice(demonstrations, tiny.warm_start_batch)), tokenizer)
            # Padding is on the right, so causal attention alone keeps real positions from seeing it.
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            loss_value = loss.item()
            bar.set_postfix(loss=f"{loss_value:.3f}", refresh=False)
            bar.update()
    model.eval()
    return loss_value


def _lr_share(step: int, steps: int) -> float:
    """Fraction of the peak learning rate at `step` of `steps`."""
    warmup = max(1, round(_WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _demonstrations(tiny: TinyConfig, arithmetic: ArithmeticConfig) -> Iterator[tuple[str, str]]:
    """An endless stream of (question, solution)."""
    rng = random.Random(tiny.warm_start_seed)
    slips = Slips(forgotten_carry=tiny.forgotten_carry, wrong_digit=tiny.wrong_digit)
    for exercise in warm_start_exercises(arithmetic, tiny.warm_start_seed):
        yield exercise.question, demonstration(exercise, slips, rng)


def _batch(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded (input_ids, labels), int64 [pairs, longest]; labels are -100 on prompt and padding.

    Prompts are templated as in RL; a solution ends with the end-of-turn token.
    """
    plain = DataConfig()
    prompts = tokenize_prompts([conversation(question, plain) for question, _ in pairs], plain, tokenizer)
    solutions = tokenizer([solution + TURN_END for _, solution in pairs], add_special_tokens=False)["input_ids"]
    longest = max(len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions, strict=True))
    input_ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), longest), -100)
    for row, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        input_ids[row, :end] = torch.tensor(prompt + solution)
        labels[row, len(prompt) : end] = torch.tensor(solution)
    return input_ids, labels

"""What a packed microbatch holds, whole and split over context-parallel ranks."""

from __future__ import annotations

from array import array

import pytest
import torch

from etr_megatron.errors import UserError
from etr_megatron.policy.context import gathered_order, own_positions
from etr_megatron.policy.packing import pack, refuse_unknown_tokens

CPU = torch.device("cpu")


def test_rows_predict_exactly_the_response_tokens():
    sequences = [([7, 8, 9], [1, 2]), ([5], [3]), ([4, 4], [6, 6, 6])]
    batch = pack(sequences, [2, 0], multiple=1, device=CPU)
    assert batch.tokens.tolist() == [[4, 4, 6, 6, 6, 7, 8, 9, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert batch.cu_seqlens.tolist() == [0, 5, 10] and batch.max_seqlen == 5 and batch.cu_seqlens.dtype == torch.int32
    # Each row's target is the next token in the packed sequence.
    assert batch.tokens[0, batch.rows + 1].tolist() == batch.targets.tolist() == [6, 6, 6, 1, 2]
    assert batch.row_sample.tolist() == [2, 2, 2, 0, 0]
    assert batch.row_position.tolist() == [0, 1, 2, 0, 1]


def test_rows_predict_only_what_the_model_drew():
    # Drawn: 1 2 _ _ 5 of the first response, nothing of the second, all but the first token of the third.
    sequences = [([7, 8, 9], [1, 2, 3, 4, 5], [1, 1, 0, 0, 1]), ([5], [3, 3], [0, 0]), ([4, 4], [6, 6, 7], [0, 1, 1])]
    batch = pack(sequences, [2, 1, 0], multiple=1, device=CPU)
    assert batch.tokens.tolist() == [[4, 4, 6, 6, 7, 5, 3, 3, 7, 8, 9, 1, 2, 3, 4, 5]]  # replies are part of the context
    assert batch.rows.tolist() == [2, 3, 10, 11, 14]
    assert batch.tokens[0, batch.rows + 1].tolist() == batch.targets.tolist() == [6, 7, 1, 2, 5]
    assert batch.row_sample.tolist() == [2, 2, 0, 0, 0]
    assert batch.row_position.tolist() == [0, 1, 0, 1, 2]  # among the drawn tokens


@pytest.mark.parametrize("cp_rank", [0, 1])
def test_a_mask_of_ones_is_none(cp_rank):
    plain = [([7, 8, 9], [1, 2]), ([5], [3]), ([4] * 9, [6] * 23)]
    masked = [(prompt, response, array("B", [1] * len(response))) for prompt, response in plain]
    found, wanted = (pack(some, [2, 0, 1], multiple=4, device=CPU, cp=2, cp_rank=cp_rank) for some in (masked, plain))
    for name, value in vars(wanted).items():
        assert torch.equal(getattr(found, name), value) if isinstance(value, torch.Tensor) else getattr(found, name) == value


@pytest.mark.parametrize("mask", [[1], [1, 0, 1]])
def test_a_mask_of_another_length_than_the_response_is_refused(mask):
    with pytest.raises(ValueError, match=f"sample 1 has a loss mask of {len(mask)} values for 2 response tokens"):
        pack([([1], [2]), ([3], [4, 5], mask)], [0, 1], multiple=1, device=CPU)


@pytest.mark.parametrize("numbers", [[0], []])
def test_padding_is_a_sequence_of_its_own_without_loss_rows(numbers):
    batch = pack([([7, 8, 9], [1, 2])], numbers, multiple=4, device=CPU)
    assert batch.tokens.shape[1] % 4 == 0 and batch.tokens.shape[1] > 0
    assert batch.cu_seqlens[-1] == batch.tokens.shape[1]
    assert len(batch.rows) == 2 * len(numbers)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="sample 1 has an empty prompt"):
        pack([([1], [2]), ([], [3])], [0, 1], multiple=1, device=CPU)


@pytest.mark.parametrize(
    ("sequences", "complaint"),
    [
        ([([1], [2, 9]), ([3], [4, 10, 1])], "the response of sample 1 has token 10,"),
        ([([1, 12], [2])], "the prompt of sample 0 has token 12,"),
        ([([1], [2, -1])], "the response of sample 0 has token -1,"),
    ],
)
def test_tokens_outside_of_the_vocabulary_are_refused(sequences, complaint):
    with pytest.raises(UserError, match=f"{complaint} outside the model's vocab_size of 10;"):
        refuse_unknown_tokens(sequences, 10)


def test_every_token_of_the_vocabulary_and_none_are_fine():
    refuse_unknown_tokens([([0, 9], [9, 0]), ([5], [])], 10)


def test_context_parallel_ranks_have_a_chunk_from_each_end_of_every_sequence():
    first, second = list(range(10, 23)), list(range(30, 36))  # 13 and 6 tokens: 16 and 8 with their padding, chunks of 4 and 2
    sequences = [(first[:4], first[4:]), (second[:5], second[5:])]
    one, two = (pack(sequences, [0, 1], multiple=1, device=CPU, cp=2, cp_rank=rank) for rank in (0, 1))
    assert one.tokens.tolist() == [[10, 11, 12, 13, 22, 0, 0, 0, 30, 31, 0, 0]]
    assert two.tokens.tolist() == [[14, 15, 16, 17, 18, 19, 20, 21, 32, 33, 34, 35]]
    assert one.positions.tolist() == [[0, 1, 2, 3, 12, 13, 14, 15, 0, 1, 6, 7]]
    assert one.cu_seqlens.tolist() == two.cu_seqlens.tolist() == [0, 16, 24] and one.max_seqlen == two.max_seqlen == 16
    # The prompt's last token, on rank 0, predicts the response's first, on rank 1; the last token predicts nothing.
    assert (one.rows.tolist(), one.targets.tolist(), one.row_position.tolist()) == ([3], [14], [0])
    assert two.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10]
    assert two.targets.tolist() == [15, 16, 17, 18, 19, 20, 21, 22, 35]
    assert two.row_position.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0] and two.row_sample.tolist() == [0] * 8 + [1]


def test_context_parallel_ranks_count_drawn_tokens_over_all_chunks():
    # Chunks of 4 tokens: prompt 10 11 12 and response 13 to 25, whose tokens 14, 15, 19, 20 and 25 are replies.
    mask = [0 if token in (14, 15, 19, 20, 25) else 1 for token in range(13, 26)]
    one, two = (
        pack([([10, 11, 12], list(range(13, 26)), mask)], [0], multiple=1, device=CPU, cp=2, cp_rank=rank) for rank in (0, 1)
    )
    assert one.tokens.tolist() == [[10, 11, 12, 13, 22, 23, 24, 25]]
    assert (one.rows.tolist(), one.targets.tolist()) == ([2, 4, 5], [13, 23, 24])
    assert one.row_position.tolist() == [0, 6, 7]
    assert two.tokens.tolist() == [[14, 15, 16, 17, 18, 19, 20, 21]]
    assert (two.rows.tolist(), two.targets.tolist()) == ([1, 2, 3, 6, 7], [16, 17, 18, 21, 22])
    assert two.row_position.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("cp", "multiple"), [(2, 3), (4, 2), (2, 4), (3, 128)])
@pytest.mark.parametrize("numbers", [[0, 1, 2], [1], []])
@pytest.mark.parametrize("mask", [(), [1, 0, 0, 1] * 5 + [0, 1, 1]])
def test_context_parallel_ranks_have_every_row_once_and_the_multiple_of_tokens(cp, multiple, numbers, mask):
    sequences = [([7, 8, 9], [1, 2]), ([5], [3], [0] if mask else ()), ([4] * 9, [6] * 23, mask)]
    parts = [pack(sequences, numbers, multiple=multiple, device=CPU, cp=cp, cp_rank=rank) for rank in range(cp)]
    whole = pack(sequences, numbers, multiple=1, device=CPU)
    assert {part.tokens.shape[1] % multiple for part in parts} == {0}
    assert len({part.tokens.shape[1] for part in parts}) == 1
    assert parts[0].tokens.shape[1] * cp == parts[0].cu_seqlens[-1] > 0

    def rows(batch):
        return zip(batch.row_sample.tolist(), batch.row_position.tolist(), batch.targets.tolist(), strict=True)

    assert sorted(row for part in parts for row in rows(part)) == sorted(rows(whole))


@pytest.mark.parametrize("cp", [1, 2, 3])
def test_gathered_tokens_of_context_parallel_ranks_are_put_back_behind_each_other(cp):
    sequences = [([7, 8, 9], [1, 2]), ([5], [3]), (list(range(20, 29)), list(range(30, 53)))]
    parts = [pack(sequences, [0, 1, 2], multiple=1, device=CPU, cp=cp, cp_rank=rank) for rank in range(cp)]
    lengths = parts[0].cu_seqlens.diff().tolist()
    ids = [[*prompt, *response] for prompt, response in sequences]
    wanted = [token for one, length in zip(ids, lengths, strict=True) for token in [*one, *[0] * (length - len(one))]]
    assert torch.cat([part.tokens[0] for part in parts])[gathered_order(lengths, cp)].tolist() == wanted
    for rank, part in enumerate(parts):
        assert torch.equal(own_positions(lengths, cp, rank), part.positions[0])

"""A pending group: how it grows over weight syncs, when it is too old, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
from array import array

from safetensors.torch import load, save

from etr_megatron.rollout.engine import GenerationOutput
from etr_megatron.rollout.pending_group import PendingGroup, extend, pack, unpack
from etr_megatron.types import Group, Problem, Sample

PROBLEM = Problem("p", "6 times 7?", "42", [1, 2])


def held(*samples: Sample, **options) -> PendingGroup:
    return PendingGroup(Group("p@5", PROBLEM, list(samples)), 5, **options)


def test_a_response_has_the_version_of_each_token_only_where_there_are_several():
    sample = Sample(0, [], [], "abort", 2)
    steps = [((), 3, [], 3), ((4, 5), 3, [], 3), ((), 6, [], 3), ((6,), 6, [3, 3, 6], 6), ((), 7, [3, 3, 6], 6)]
    for ids, version, each, last in steps:
        extend(sample, GenerationOutput(0, list(ids), [-one / 8 for one in ids], "abort", version))
        assert sample.weight_versions.tolist() == each and sample.weight_version == last
    extend(sample, GenerationOutput(0, [7, 8], [-0.875, -1.0], "stop", 7))
    assert sample.response_ids.tolist() == [4, 5, 6, 7, 8] and sample.token_versions().tolist() == [3, 3, 6, 7, 7]
    assert sample.rollout_logprobs.tolist() == [-0.5, -0.625, -0.75, -0.875, -1.0] and sample.finish_reason == "stop"


def test_what_has_a_token_that_is_too_old_is_drawn_anew_and_nothing_else():
    mixed = Sample(0, [4, 5, 6], [-0.1, -0.2, -0.3], "stop", 8, "x", 0.0, "ok", [5, 6, 8])
    as_old = Sample(1, [7], [-0.1], "stop", 6, "y", 0.0, "ok")
    not_begun = Sample(2, [], [], "abort", 3)
    group = held(mixed, as_old, not_begun, is_left_out=True)
    assert group.oldest_version == 3 and held(mixed, as_old).oldest_version == 5
    assert not group.redo_older_than(5) and not group.is_redone and group.is_left_out
    assert group.redo_older_than(6) and group.is_redone and not group.is_left_out
    anew, *others = group.group.samples
    assert (anew.index, len(anew.response_ids), len(anew.rollout_logprobs)) == (0, 0, 0)
    assert anew.finish_reason == "abort" and anew.reward is None
    assert others[0] is as_old and others[1] is not_begun
    assert not group.redo_older_than(6)


def test_groups_in_a_checkpoint_are_exact_and_no_token_is_in_its_json():
    mixed = Sample(0, [70_123, 6, 7], [-0.1, -1 / 3, -2e-9], "stop", 4, "x € \u0000", 1.0, "ok", [3, 4, 4])
    mixed.routing = array("B", [5, 0, 255])
    begun, not_begun = Sample(1, [8], [-0.25], "abort", 4), Sample(0, [], [], "abort", 2)
    flat = Sample(0, [9], [-0.5], "stop", 4, "y", 0.0, "ok")
    groups = [
        PendingGroup(Group("p@5", PROBLEM, [mixed, begun]), 5, is_redone=True),
        PendingGroup(Group("q@6", PROBLEM, [not_begun]), 6),
        PendingGroup(Group("r@6", PROBLEM, [flat]), 6, is_left_out=True),
    ]
    found, tensors = pack(groups)
    assert unpack(json.loads(json.dumps(found)), load(save(tensors))) == groups
    assert "70123" not in json.dumps(found) and tensors["response_ids"].tolist() == [70_123, 6, 7, 8, 9]
    assert unpack([], load(save(pack([])[1]))) == unpack([], {}) == []
    before = {name: tensor for name, tensor in tensors.items() if not name.startswith("routing")}
    mixed.routing = array("B")
    assert unpack(found, before) == groups  # a checkpoint from before routing was recorded


def test_of_a_response_that_goes_on_the_experts_are_those_of_its_last_pass():
    """The keys and values of a continued response are recomputed from its first token on."""
    sample = Sample(0, [], [], "abort", 1)
    extend(sample, GenerationOutput(0, [5, 6], [-1.0, -2.0], "abort", 1))
    assert not sample.routing
    extend(sample, GenerationOutput(0, [7], [-3.0], "abort", 1, routing=array("B", [1, 2, 3])))
    extend(sample, GenerationOutput(0, [], [], "abort", 2))
    assert sample.routing == array("B", [1, 2, 3])
    extend(sample, GenerationOutput(0, [8], [-4.0], "stop", 2, routing=array("B", [4, 5, 6, 7])))
    assert sample.routing == array("B", [4, 5, 6, 7]) and sample.token_versions().tolist() == [1, 1, 1, 2]


def test_what_goes_on_while_a_checkpoint_is_written_is_not_in_it():
    sample = Sample(0, [4], [-0.5], "turn", 3, loss_mask=[1], messages=[{"role": "assistant", "content": "4"}])
    packed, columns = pack([held(sample)])
    extend(sample, GenerationOutput(0, [5], [-0.25], "stop", 4))
    sample.messages += [{"role": "user", "content": "and?"}]
    (again,) = unpack(packed, columns)
    (found,) = again.group.samples
    assert found.response_ids.tolist() == [4] and [message["content"] for message in found.messages] == ["4"]

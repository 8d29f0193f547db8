"""The weight map: round trips in every layout without processes, refusals by name, an independent exporter as oracle."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from etr_megatron.convert import Ranks, to_megatron
from etr_megatron.errors import UserError
from etr_megatron.weights import (
    SafetensorsDir,
    TorchDistDir,
    check_checkpoint,
    join_shards,
    megatron_shard,
    padded_vocab_size,
    read_architecture,
    read_shard,
    weights_of,
)
from etr_megatron.weights.torch_dist_dir import Chunk, _overlapping
from etr_megatron.weights.torch_saved import find_values
from tests.hf_models import FAMILIES, WITH_EXPERTS, in_turn
from tests.reads import bytes_read_by


def tensors_of(model: str) -> dict[str, torch.Tensor]:
    return load_file(f"{model}/model.safetensors")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_split_and_join_give_every_tensor_back_bit_for_bit(hf_models, family, tp):
    arch, checkpoint = read_architecture(hf_models[family]), SafetensorsDir(hf_models[family])
    found = {}
    for weight in weights_of(arch):
        shards = [megatron_shard(weight, arch, tp, rank) for rank in range(tp)]
        parts = [(shard, read_shard(weight, shard, checkpoint.read)) for shard in shards]
        assert all(tuple(part.shape) == shard.shape for shard, part in parts)
        found.update(join_shards(weight, parts))
    wanted = tensors_of(hf_models[family])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_shard_reads_only_its_own_ranges(hf_models):
    arch, checkpoint = read_architecture(hf_models["qwen3"]), SafetensorsDir(hf_models["qwen3"])
    for weight in weights_of(arch):
        shard = megatron_shard(weight, arch, 2, 1)
        read = bytes_read_by(lambda weight=weight, shard=shard: read_shard(weight, shard, checkpoint.read))
        wanted = sum(torch.Size(piece.size).numel() for piece in shard.pieces)
        whole = sum(torch.Size(shape).numel() for shape in weight.shapes)
        assert wanted <= (whole if weight.split == "replicated" else whole / 2)
        assert 4 * wanted <= read <= 4 * wanted + 500, weight.megatron


def test_padded_vocabulary_of_qwen3_32b():
    assert [padded_vocab_size(151936, tp) for tp in (1, 4, 8)] == [151936, 152064, 152576]


def edited(hf_models, tmp_path, *, config=None, tensors=None) -> str:
    copy = tmp_path / "model"
    shutil.copytree(hf_models["qwen3"], copy)
    if config:
        content = json.loads((copy / "config.json").read_text()) | config
        (copy / "config.json").write_text(json.dumps(content))
    if tensors:
        content = tensors_of(str(copy))
        tensors(content)
        save_file(content, copy / "model.safetensors")
    return str(copy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"intermediate_size": 96}, r"mlp\.gate_proj\.weight has shape \[80, 48\] where config.json says \[96, 48\]"),
        (
            {"num_hidden_layers": 5},
            r"11 tensors are missing \(model\.layers\.4\.input_layernorm\.weight, .*, and 1 more\)",
        ),
        (
            {"num_hidden_layers": 3},
            r"11 tensors are unknown to the qwen3 family with 3 layers \(model\.layers\.3\..*, and 1 more\)",
        ),
        ({"vocab_size": 302}, r"embed_tokens\.weight has shape \[301, 48\]"),
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures is \['GPT2LMHeadModel'\]; supported are"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type 'dynamic' is not supported"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused_by_field(hf_models, tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        check_checkpoint(edited(hf_models, tmp_path, config=config))


def test_missing_and_transposed_tensors_are_refused_by_name(hf_models, tmp_path):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"):
            tensors[name] = tensors[name].t().contiguous()

    with pytest.raises(
        UserError,
        match=r"1 tensor is missing \(model\.norm\.weight\); 2 tensors are of another shape \(.*layers\.1\..* .*layers\.2\.",
    ):
        check_checkpoint(edited(hf_models, tmp_path, tensors=spoil))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: replace(part, offset=(0, *part.offset[1:])), r"has duplicate values from \[0, 0, 0\] on"),
        (lambda part: replace(part, offset=(4, *part.offset[1:])), r"a part of .* lies outside the tensor"),
        (None, r"mlp\.linear_fc2\.weight has 11520 of 15360 values"),
    ],
    ids=["twice", "outside", "missing"],
)
def test_chunks_that_do_not_cover_a_stored_tensor_exactly_once_are_refused(hf_models, tmp_path, change, message):
    """In the first two cases, the parts' sizes still add up to the tensor's."""
    to_megatron(Path(hf_models["qwen3"]), tmp_path / "megatron", Ranks())
    checkpoint, name = TorchDistDir(tmp_path / "megatron"), "decoder.layers.mlp.linear_fc2.weight"
    checkpoint.refuse_gaps(checkpoint.shapes())
    chunks = checkpoint._chunks[name]
    last = chunks.pop()
    if change is not None:
        chunks.append(change(last))
    with pytest.raises(UserError, match=message):
        checkpoint.refuse_gaps(checkpoint.shapes())


def test_a_common_value_of_two_chunks_is_found_in_any_arrangement(tmp_path):
    """Compared with a count per element; boxes that only touch do not overlap."""
    generator = random.Random(0)
    seen = set()
    for _ in range(300):
        boxes = [
            tuple((begin, generator.randint(1, 3)) for begin in (generator.randint(0, 5), generator.randint(0, 5)))
            for _ in range(generator.randint(1, 5))
        ]
        count = torch.zeros(9, 9, dtype=torch.int32)
        for (row, rows), (col, cols) in boxes:
            count[row : row + rows, col : col + cols] += 1
        chunks = [Chunk((row, col), (rows, cols), tmp_path, 0, 0) for (row, rows), (col, cols) in boxes]
        assert (_overlapping(chunks, 0) is not None) == bool((count > 1).any())
        seen.add(bool((count > 1).any()))
    assert seen == {True, False}


def test_a_cut_off_file_and_an_empty_directory_are_refused_by_path(hf_models, tmp_path):
    copy = edited(hf_models, tmp_path)
    file = f"{copy}/model.safetensors"
    with open(file, "rb+") as handle:
        handle.truncate(1000)
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        check_checkpoint(copy)
    with pytest.raises(UserError, match=r"empty/config\.json does not exist"):
        check_checkpoint(str(tmp_path / "empty"))


def two_files(folder: Path, index: dict[str, object] | None) -> Path:
    """`x` and `y` hold different values of `both`, and each also holds a tensor of its own."""
    for number, name in enumerate("xy"):
        save_file({"both": torch.full((3,), float(number)), f"{name}_alone": torch.ones(2)}, folder / f"{name}.safetensors")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize(("file", "value"), [("x", 0.0), ("y", 1.0)])
def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path, file, value):
    """The other file's copy is ignored; tensors that the index does not name, in files that it does name, are not."""
    index = {"both": f"{file}.safetensors", "x_alone": "x.safetensors", "y_alone": "y.safetensors"}
    checkpoint = SafetensorsDir(two_files(tmp_path, index))
    assert checkpoint.read("both", (0,), (3,)).tolist() == [value] * 3
    del index["x_alone" if file == "x" else "y_alone"]
    assert SafetensorsDir(two_files(tmp_path, index)).shapes() == {"both": (3,), "x_alone": (2,), "y_alone": (2,)}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"both is in both x\.safetensors and y\.safetensors"),
        ({"x_alone": "x.safetensors", "y_alone": "y.safetensors"}, r"both is in both x\.safetensors and y\.safetensors"),
        (
            {"both": "y.safetensors", "x_alone": "y.safetensors"},
            r"index\.json names missing tensors: x_alone in y\.safetensors; fetch",
        ),
        ({"both": "x.safetensors", "x_alone": "z.safetensors"}, r"names z\.safetensors, which does not exist"),
        ({"both": 1}, r"index\.json is broken \(it has no weight_map with a file for each tensor\)"),
        ({}, r"index\.json is broken \(it has no weight_map with a file for each tensor\)"),
    ],
    ids=["no index", "not in the index", "in another file", "no such file", "no file name", "empty index"],
)
def test_files_and_index_that_contradict_each_other_are_refused_by_name(tmp_path, index, message):
    with pytest.raises(UserError, match=message):
        SafetensorsDir(two_files(tmp_path, index))


def test_a_file_beside_the_index_that_transformers_would_read_instead_is_refused(tmp_path):
    two_files(tmp_path, {"both": "x.safetensors", "x_alone": "x.safetensors", "y_alone": "y.safetensors"})
    save_file({"both": torch.full((3,), 2.0)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model\.safetensors and an .*index\.json that does not name it; remove the one"):
        SafetensorsDir(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"both": "model.safetensors"}}))
    assert SafetensorsDir(tmp_path).read("both", (0,), (3,)).tolist() == [2.0] * 3


def test_a_type_that_cannot_be_read_is_named_and_is_no_damage(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(2, dtype=torch.uint16)}, file)
    with pytest.raises(UserError, match=r"model\.safetensors: x has type U16; supported are F64, F32"):
        SafetensorsDir(tmp_path)


@pytest.mark.parametrize(
    ("stored", "is_dense"),
    [
        (lambda whole: whole, True),
        (lambda whole: whole[2:5], False),
        (lambda whole: whole[:3], False),
        (lambda whole: whole[:, 1:4], False),
        (lambda whole: whole.t(), False),
    ],
    ids=["whole", "rows", "first rows", "columns", "transposed"],
)
def test_values_are_found_in_a_saved_tensor_where_they_are_dense_and_all_of_its_storage(tmp_path, stored, is_dense):
    """`torch.save` writes a whole storage, even if the tensor is only a part of it."""
    tensor = stored(torch.arange(42.0).view(6, 7))
    torch.save(tensor, tmp_path / "saved")
    content = b"before" + (tmp_path / "saved").read_bytes()
    (tmp_path / "saved").write_bytes(content + b"after")
    found = find_values(tmp_path / "saved", 6, len(content) - 6, torch.float32, tuple(tensor.shape))
    assert (found is not None) == is_dense
    if is_dense:
        out = torch.empty(tensor.shape)
        found.read_into((0, 0), out)
        assert torch.equal(out, tensor)


@pytest.mark.parametrize(
    ("family", "layout"),
    [*((family, (2, 2)) for family in FAMILIES), *((family, (2, 1)) for family in WITH_EXPERTS), ("qwen3_tied", (1, 2))],
    ids=lambda x: x if isinstance(x, str) else f"tp{x[0]}pp{x[1]}",
)
def test_export_from_ranks_equals_the_checkpoint_bit_for_bit(gangs, hf_models, family, layout):
    tp, pp = layout
    wanted = tensors_of(hf_models[family])
    for found in gangs(tp * pp).run(
        "tests.policy_jobs:export", model=hf_models[family], overrides=[f"parallel.tp={tp}", f"parallel.pp={pp}"]
    ):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


MIXTURES = {
    "ep2": (2, ["parallel.tp=1", "parallel.ep=2"]),
    "tp2_etp1": (2, ["parallel.tp=2", "parallel.etp=1"]),
    "tp2_ep2_etp1": (2, ["parallel.tp=2", "parallel.ep=2", "parallel.etp=1"]),
    "tp2_ep2": (4, ["parallel.tp=2", "parallel.ep=2"]),
    "pp2_ep2": (4, ["parallel.tp=1", "parallel.pp=2", "parallel.ep=2"]),
}


@pytest.mark.parametrize(("family", "layout"), in_turn(WITH_EXPERTS, MIXTURES))
def test_export_of_experts_from_ranks_equals_the_checkpoint_bit_for_bit(gangs, hf_models, family, layout):
    world, overrides = MIXTURES[layout]
    wanted = tensors_of(hf_models[family])
    for found in gangs(world).run("tests.policy_jobs:export", model=hf_models[family], overrides=overrides):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

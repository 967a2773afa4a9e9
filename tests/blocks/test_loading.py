"""Loading: only what is asked for, as transformers would load it, and every damage named."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmasos.blocks import checkpoint
from llmasos.blocks.ends import load_ends
from llmasos.blocks.layers import BlockChunk, load_blocks
from llmasos.blocks.registry import resolve
from llmasos.errors import CheckpointError, UnsupportedModelError, UsageError
from llmasos.span import Span
from tests.checkpoints import BLOCKS, HIDDEN, make_checkpoint, make_model, write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "tiny-llama", "llama")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def output(folder: Path) -> torch.Tensor:
    span = Span(1, 4)
    blocks = load_blocks(resolve(str(folder)), span)
    rows = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(5))
    return blocks.forward([BlockChunk(blocks.new_cache(), span, 0, rows)])[0]


def test_only_the_tensors_of_the_span_are_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = checkpoint.stored_tensor

    def recorded(name: str, stored: checkpoint.Stored) -> torch.Tensor:
        read.append(name)
        return original(name, stored)

    monkeypatch.setattr(checkpoint, "stored_tensor", recorded)
    spec = resolve(str(llama))
    assert read == []
    load_blocks(spec, Span(1, 3))
    assert read
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in read)
    assert len(read) == len(set(read)) == 2 * (9 + 4)  # weights and biases of a llama block with attention_bias
    read.clear()
    load_ends(spec)
    assert sorted(read) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_sharded_and_unsharded_files_are_the_same_model(llama: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path / "sharded", "llama", shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert torch.equal(output(sharded), output(llama))
    assert resolve(str(sharded)).digest == resolve(str(llama)).digest


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama-tied", {"tie_word_embeddings": True}),
        ("llama-tied", {"tie_word_embeddings": False}),
        # transformers does not read the width of experts out of GGUF files and takes it to be 768
        ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True, "moe_intermediate_size": 768}),
    ],
    ids=["tied", "untied", "experts"],
)
def test_a_gguf_file_gives_what_its_source_gives(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(family, **changes)
    spec = resolve(str(write_gguf(tmp_path / "tiny.gguf", model)))
    assert (spec.name, spec.blocks, spec.hidden_size, spec.context_tokens) == ("tiny", BLOCKS, HIDDEN, 120)
    assert (spec.family, spec.vocab_size, spec.eos_token_ids) == (model.config.model_type, 97, (2,))
    ids = [5, 50, 96, 7, 8]
    ends, blocks = load_ends(spec), load_blocks(spec, Span(0, BLOCKS))
    (rows,) = blocks.forward([BlockChunk(blocks.new_cache(), blocks.span, 0, ends.embed(ids, 0))])
    with torch.inference_mode():
        torch.testing.assert_close(ends.logits(rows), model(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-5)


def test_a_digest_is_the_content(llama: Path, copy: Path, tmp_path: Path) -> None:
    digest = resolve(str(llama)).digest
    assert resolve(str(copy)).digest == digest
    script = f"from llmasos.blocks.registry import resolve; print(resolve({str(llama)!r}).digest)"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest
    assert resolve(str(make_checkpoint(tmp_path / "other", "llama", seed=1))).digest != digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    assert resolve(str(copy)).digest != digest


def test_progress_ends_at_the_total(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    spec = resolve(str(llama))
    blocks = load_blocks(spec, Span(1, 4), engine="torch", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == 3
    assert seen[-1][0] == seen[-1][1] == blocks.weight_bytes


@pytest.mark.parametrize("family", ["gemma", "gemma3_text", "opt", "gpt2", "deepseek_v3", "llama3-rope"])
def test_bfloat16_is_loaded_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    """The same type for every tensor, those that must stay float32 included, and the same computed buffers."""
    folder = make_checkpoint(tmp_path, family)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    spec = resolve(str(folder))
    ends = load_ends(spec, dtype="bfloat16")
    blocks = load_blocks(spec, Span(2, 4), dtype="bfloat16", engine="torch")
    body = blocks._body
    expected = dict([*reference.named_parameters(), *reference.named_buffers()])
    for name, tensor in [*body.owner.named_parameters(), *body.owner.named_buffers()]:
        same = expected[f"{body.owner_name}.{name}"]
        assert tensor.dtype == same.dtype, name
        assert torch.equal(tensor, same), name
    ids = [4, 5, 6, 96]
    with torch.inference_mode():
        wanted = reference(torch.tensor([ids]), output_hidden_states=True)
    assert torch.equal(ends.embed(ids, 0), wanted.hidden_states[0][0])


MEMORY = """
import re, sys
from pathlib import Path
from llmasos.blocks.layers import load_blocks
from llmasos.blocks.registry import resolve
from llmasos.span import Span
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
spec = resolve("smollm2")
before = peak()
load_blocks(spec, Span.parse(sys.argv[1]))
print(peak() - before)
"""


def test_memory_of_loading_is_that_of_the_span() -> None:
    """Three blocks of smollm2 are 42 MB in float32, thirty are 425 MB. What is beyond that does not grow with them."""
    grown = {}
    for span in ("0:3", "0:30"):
        command = [sys.executable, "-c", MEMORY, span]
        grown[span] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 42 < grown["0:3"] < 42 + 90, grown
    assert 383 - 40 < grown["0:30"] - grown["0:3"] < 383 + 40, grown


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def truncate(file: Path, kept: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data))])


NAME = "model.layers.2.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated tensors": (lambda f: truncate(f / "model.safetensors", 0.7), "model.safetensors is truncated: tensor"),
    "truncated header": (lambda f: truncate(f / "model.safetensors", 0.001), "is not a safetensors file"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a safetensors file: it has 0 bytes"),
    "noise": (lambda f: (f / "model.safetensors").write_bytes(b"\x20" + bytes(7) + b"x" * 60), "its header is damaged"),
    "missing tensor": (lambda f: edit_header(f, lambda h: h.pop(NAME)), f"{NAME} is missing in .*model.safetensors"),
    "extra tensor": (
        lambda f: edit_header(f, lambda h: h.update({NAME.replace("up_proj", "odd_proj"): h[NAME]})),
        "holds tensors of block 2 that a llama model .* no place for: model.layers.2.mlp.odd_proj.weight",
    ),
    "wrong shape": (lambda f: edit_config(f, intermediate_size=57), "has the shape \\[48, 56\\], .* says \\[48, 57\\]"),
    "shape against bytes": (
        lambda f: edit_header(f, lambda h: h[NAME].update(shape=[56, 49])),
        f"{NAME} in .* has a shape that does not match its bytes",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "has its weights pickled \\(pytorch_model.bin\\)",
    ),
    "no layers stated": (lambda f: edit_config(f, num_hidden_layers=None), "does not say num_hidden_layers"),
    "no family stated": (lambda f: edit_config(f, model_type=None), "does not say which model_type"),
    "senseless config": (lambda f: edit_config(f, num_attention_heads=0), "is not a config of a llama model"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "index without shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-9.safetensors"}}'),
        "model-9.safetensors is missing, which model.safetensors.index.json names",
    ),
    "index out of the directory": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "which is not in its directory",
    ),
    "index against shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "tensor a is not in .*, where model.safetensors.index.json says it is",
    ),
    "index is no index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is not an index"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, copy: Path) -> None:
    harm, message = DAMAGES[damage]
    harm(copy)
    with pytest.raises(CheckpointError, match=message):
        load_blocks(resolve(str(copy)), Span(1, 4))


def test_damage_elsewhere_does_not_matter(copy: Path) -> None:
    edit_header(copy, lambda header: header.pop(NAME))
    load_blocks(resolve(str(copy)), Span(0, 2))


def test_a_span_outside_the_model_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match="blocks 3:6 reach beyond tiny-llama, which has 5") as caught:
        load_blocks(resolve(str(llama)), Span(3, 6))
    assert caught.value.hint == "try --blocks 0:5"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"GGML" + data[4:], "it does not start with GGUF"),
        (lambda data: data[:4] + b"\x09" + data[5:], "its version is 9"),
        (lambda data: data[:200], "not a GGUF file, or its header is damaged"),
        (lambda data: data[:-900], "is truncated: tensor"),
        (lambda data: b"", "cannot be read|damaged"),
    ],
    ids=["magic", "version", "header", "tensors", "empty"],
)
def test_a_damaged_gguf_file_is_named(damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", make_model("llama-tied", tie_word_embeddings=False))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        resolve(str(file))


def test_rotary_scaling_that_transformers_does_not_read_from_gguf_is_refused(tmp_path: Path) -> None:
    model = make_model("llama-tied", tie_word_embeddings=False)
    file = write_gguf(tmp_path / "tiny.gguf", model, extra={"rope_freqs.weight": torch.ones(4)})
    with pytest.raises(UnsupportedModelError, match="scales its rotary embedding"):
        resolve(str(file))


def test_a_gguf_tensor_without_a_place_is_refused_by_peers_too(tmp_path: Path) -> None:
    model = make_model("llama-tied", tie_word_embeddings=False)
    file = write_gguf(tmp_path / "tiny.gguf", model, extra={"blk.1.attn_q.bias": torch.ones(HIDDEN)})
    with pytest.raises(UnsupportedModelError, match=r"holds blk.1.attn_q.bias, for which"):
        load_blocks(resolve(str(file)), Span(0, 1))

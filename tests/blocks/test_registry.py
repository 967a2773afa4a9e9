"""Names: what they resolve to, and what is said when they do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmasos.blocks import hub, registry
from llmasos.blocks.layers import BlockChunk, load_blocks
from llmasos.blocks.registry import Alias, load_tokenizer, resolve
from llmasos.errors import CheckpointError, UnknownModelError, UnsupportedModelError
from llmasos.span import Span
from tests.checkpoints import BLOCKS, HIDDEN, VOCAB, make_checkpoint, make_model, write_gguf


def write_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w0")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w5"
    tokenizer.save_pretrained(folder)


def cached_repository(cache: Path, repository: str, **sizes: Any) -> str:
    """Lay a sharded checkpoint out as the hub's cache does; returns its revision."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    base = cache / f"models--{repository.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(revision)
    make_checkpoint(base / "snapshots" / revision, "llama", **sizes)
    return revision


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""

    def local_only(repository: str, name: str, **kwargs: Any) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, name, cache_dir=tmp_path, **kwargs)

    monkeypatch.setattr(hub, "hf_hub_download", local_only)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    return tmp_path


def test_a_directory(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "my-model", "qwen3")
    write_tokenizer(folder)
    spec = resolve(str(folder))
    assert (spec.name, spec.family, spec.blocks, spec.hidden_size) == ("my-model", "qwen3", BLOCKS, HIDDEN)
    assert (spec.context_tokens, spec.vocab_size, spec.eos_token_ids) == (120, VOCAB, (2,))
    assert len(spec.digest) == 64
    tokenizer = load_tokenizer(spec)
    assert tokenizer("w7 w9")["input_ids"] == [7, 9]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False)
    assert asked == "w7 w5"


def test_the_generation_config_knows_the_last_tokens_best(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [11, 12]}))
    assert resolve(str(folder)).eos_token_ids == (11, 12)


def test_smollm2_is_found_without_a_network(offline_hub: Path) -> None:
    spec = resolve("smollm2")
    assert (spec.name, spec.family, spec.blocks, spec.hidden_size) == ("smollm2", "llama", 30, 576)
    assert (spec.context_tokens, spec.vocab_size, spec.eos_token_ids) == (8192, 49152, (2,))
    tokenizer = load_tokenizer(spec)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi 42"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(chat)["input_ids"]
    assert ids[0] == 1
    assert tokenizer.decode(ids) == chat


def test_an_alias_falls_back_to_the_hub(offline_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ALIASES, "small", Alias("no_such_package", "some/small"))
    with pytest.raises(UnknownModelError, match=r"config.json of some/small is not in the cache .* cannot be reached"):
        resolve("small")
    cached_repository(offline_hub, "some/small")
    assert resolve("small").name == "small"


def test_a_hub_id_fetches_only_the_shards_it_needs(offline_hub: Path) -> None:
    revision = cached_repository(offline_hub, "some/model", shard_size="60KB")
    snapshot = offline_hub / "models--some--model" / "snapshots" / revision
    write_tokenizer(snapshot)
    spec = resolve("some/model")
    assert (spec.name, spec.blocks) == ("some/model", BLOCKS)
    assert load_tokenizer(spec)("w8")["input_ids"] == [8]
    shards = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in shards.items() if name.startswith("model.layers.3.")}
    elsewhere = sorted(set(shards.values()) - needed)
    assert elsewhere
    for shard in elsewhere:
        (snapshot / shard).unlink()
    blocks = load_blocks(spec, Span(3, 4))
    blocks.forward([BlockChunk(blocks.new_cache(), blocks.span, 0, torch.zeros(1, HIDDEN))])
    with pytest.raises(UnknownModelError, match=f"({'|'.join(elsewhere)}) of some/model is not in the cache"):
        load_blocks(spec, Span(0, 5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/place", "'no/such/place' is not an alias \\(smollm2\\), and no such file"),
        ("some/model", "config.json of some/model is not in the cache of this machine"),
        ("gone.gguf", "'gone.gguf' is not an alias"),
        ("", "'' is not an alias"),
    ],
)
def test_an_unknown_name_says_what_to_type(name: str, message: str, offline_hub: Path) -> None:
    with pytest.raises(UnknownModelError, match=message) as caught:
        resolve(name)
    assert "--model smollm2" in caught.value.hint


def test_places_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"has no config.json"):
        resolve(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UnknownModelError, match=r"neither a directory nor a .gguf file"):
        resolve(str(tmp_path / "notes.txt"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UnsupportedModelError, match="pickle"):
        resolve(str(tmp_path / "pytorch_model.bin"))


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    spec = resolve(str(make_checkpoint(tmp_path, "llama")))
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(spec)


def test_a_gguf_tokenizer(tmp_path: Path) -> None:
    spec = resolve(str(write_gguf(tmp_path / "tiny.gguf", make_model("llama-tied", tie_word_embeddings=False))))
    tokenizer = load_tokenizer(spec)
    assert (tokenizer.eos_token_id, tokenizer("ababb")["input_ids"]) == (2, [5, 5, 4])

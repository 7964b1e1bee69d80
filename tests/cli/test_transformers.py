"""A Hugging Face directory as model, with its tokenizer for text. Importing transformers takes seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # the library's own remarks are not ours to judge
    pytest.mark.usefixtures("mended_torchvision"),  # transformers imports it where it is installed
]
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "road", "."]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny Llama with random weights and a tokenizer of ten words, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "llama"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(WORDS) + 1,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(WORDS), (600,), generator=draw).tolist()
    (tmp_path / "words.txt").write_text(" ".join(WORDS[index] for index in chosen), encoding="utf-8")
    return tmp_path / "words.txt"


def test_a_language_model_goes_the_whole_road_on_a_text(directory: Path, text: Path, cli: Any, tmp_path: Path) -> None:
    data = (text, "--length", "12", "--batch-size", "10")
    found = cli("inspect", directory, *data, "--json")
    assert found.code == 0, found.err
    assert found.json["class"] == "LlamaForCausalLM"
    assert found.json["weights"] == "directory"
    made = cli("compress", directory, *data, "--params", "0.8", "--out", tmp_path / "small", "--json")
    assert made.code == 0, made.err
    assert made.json["plan"]["calibration"]["samples"] == 40
    seen = cli("compare", directory, tmp_path / "small", *data, "--json")
    assert seen.code == 0, seen.err
    assert seen.json["comparison"]["samples"] == 50
    assert len(seen.json["comparison"]["perplexity"]) == 2


def test_a_text_beside_no_tokenizer_fails(directory: Path, text: Path, cli: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink(missing_ok=True)
    done = cli("inspect", directory, text)
    assert done.code == 1
    assert "holds a tokenizer" in done.err


def test_a_directory_without_weights_fails(directory: Path, text: Path, cli: Any) -> None:
    (directory / "model.safetensors").unlink()
    done = cli("inspect", directory, text)
    assert done.code == 1
    assert "config.json and the weights" in done.err


def test_weights_that_are_missing_are_not_made_up(directory: Path, text: Path, cli: Any) -> None:
    state = load_file(directory / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    done = cli("inspect", directory, text)
    assert done.code == 1
    assert "1 missing (lm_head.weight)" in done.err


@pytest.mark.parametrize("name", ["NoSuchModel", "pipeline", "AutoTokenizer"])
def test_only_a_model_class_of_transformers_is_built(name: str, directory: Path, text: Path, cli: Any) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [name]
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = cli("inspect", directory, text)
    assert done.code == 1
    assert f"got {name!r}" in done.err


def test_code_beside_the_weights_is_never_run(directory: Path, text: Path, cli: Any, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.update(
        model_type="foreign", auto_map={"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    )
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    done = cli("inspect", directory, text)
    assert done.code == 1
    assert not (tmp_path / "ran").exists()


def test_a_copy_of_the_directory_is_a_factory_too(directory: Path, text: Path, cli: Any, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "copy")
    data = (text, "--length", "12", "--limit", "20")
    made = cli("compress", directory, *data, "--params", "0.8", "--out", tmp_path / "small")
    assert made.code == 0, made.err
    done = cli("inspect", tmp_path / "small", *data[:3], "--factory", tmp_path / "copy", "--json")
    assert done.code == 0, done.err
    assert done.json["weights"] == "checkpoint"

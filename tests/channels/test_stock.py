"""A model of transformers that lost channels, as an ordinary directory of its own library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import ModelError, OptionError, PlanError, WriteError

pytestmark = [
    pytest.mark.filterwarnings("default"),  # the library's own remarks are not ours to judge
    pytest.mark.usefixtures("mended_torchvision"),  # transformers imports it where it is installed
]
READ = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["rankfold"] = None  # a library that is not there
sys.modules["torchvision"] = None  # transformers does without
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(24).reshape(2, 12)
with torch.no_grad():
    save_file({"logits": model(ids).logits}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def llama(mended_torchvision: None) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def words() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(40, (20, 12), generator=draw)} for _ in range(2)]


@pytest.fixture(scope="module")
def out(llama: Any, words: Any) -> rf.Compressed:
    return rf.compress(
        llama,
        words,
        budget=rf.Budget(params=0.8),
        families=[rf.Interpolative(uniform=True)],
        selector=rf.SameShare(),
    )


def test_it_loads_where_rankfold_cannot_be_imported(out: rf.Compressed, tmp_path: Path) -> None:
    rf.save_pretrained(out, tmp_path / "small")
    assert {file.name for file in (tmp_path / "small").iterdir()} >= {"config.json", "model.safetensors"}
    config = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    kept = {decision.group: len(decision.kept) for decision in out.plan.channels}
    assert config["intermediate_size"] == kept["model.layers.0.mlp.gate_proj"] < 48
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert config["head_dim"] == 4
    assert config["hidden_size"] % config["num_attention_heads"] == 0  # or transformers would refuse it
    logits = tmp_path / "logits.safetensors"
    code = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "small"), str(logits)], check=False, capture_output=True, text=True
    )
    assert code.returncode == 0, code.stderr
    with torch.no_grad():
        expected = out.model(torch.arange(24).reshape(2, 12)).logits
    torch.testing.assert_close(load_file(logits)["logits"], expected)


def test_the_directory_is_replaced_only_when_asked(out: rf.Compressed, tmp_path: Path) -> None:
    rf.save_pretrained(out, tmp_path / "small")
    with pytest.raises(WriteError, match="new or empty"):
        rf.save_pretrained(out, tmp_path / "small")
    rf.save_pretrained(out, tmp_path / "small", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["small"]  # nothing is left beside it


def test_layers_of_different_width_name_the_cure(llama: Any, words: Any, tmp_path: Path) -> None:
    out = rf.compress(
        llama,
        words,
        budget=rf.Budget(params=0.8),
        families=[rf.Interpolative()],
        selector=rf.RemovalGreedy(),
        exclude=["model.layers.1.*"],
    )
    with pytest.raises(PlanError, match=r"Interpolative\(uniform=True\)"):
        rf.save_pretrained(out, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_heads_that_no_configuration_says_stay(words: Any, tmp_path: Path) -> None:
    """BERT's size of a head is its hidden size over its number of heads: fewer heads would be larger ones."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
    out = rf.compress(model, words, budget=rf.Budget(params=0.9), families=[rf.Interpolative(uniform=True)])
    assert {decision.group.rpartition(".")[2] for decision in out.plan.channels} == {"dense"}
    assert any("no configuration of its class says fewer" in skip.reason for skip in out.plan.skips)
    rf.save_pretrained(out, tmp_path / "small")
    again = transformers.BertModel.from_pretrained(tmp_path / "small", add_pooling_layer=False).eval()
    with torch.no_grad():
        got, expected = (each(**words[0]).last_hidden_state for each in (again, out.model))
    torch.testing.assert_close(got, expected)


def test_bad_input_is_refused_by_name(llama: Any, words: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"what rankfold\.compress"):
        rf.save_pretrained(llama, tmp_path / "small")
    plain = rf.compress(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), [torch.randn(30, 8)], budget=rf.Budget(params=0.99)
    )
    with pytest.raises(ModelError, match="a model of transformers"):
        rf.save_pretrained(plain, tmp_path / "small")
    ranks = rf.compress(
        llama, words, budget=rf.Budget(params=0.8), families=[rf.WhitenedSVD()], selector=rf.Uniform(), repair=None
    )
    with pytest.raises(PlanError, match="no layer is factorised"):
        rf.save_pretrained(ranks, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_attention_of_torch_inside_a_stock_model_is_written_as_it_was(mended_torchvision: None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    class Config(transformers.PretrainedConfig):  # type: ignore[misc,name-defined]
        model_type = "attends"

        def __init__(self, inner: int = 32, **options: Any) -> None:
            super().__init__(**options)
            self.inner = inner

    class Attends(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
        config_class, main_input_name = Config, "x"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.up, self.down = nn.Linear(16, config.inner), nn.Linear(config.inner, 16)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            h = x + self.attention(x, x, x)[0]
            return h + self.down(torch.relu(self.up(h)))  # type: ignore[no-any-return]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Attends(Config()).eval(), torch.randn(40, 5, 16)
    out = rf.compress(
        model,
        [x],
        budget=rf.Budget(params=0.85),
        families=[rf.Interpolative(uniform=True)],
        selector=rf.SameShare(),
        repair=None,
    )
    assert out.plan.split == ("attention",)
    assert [decision.group for decision in out.plan.channels] == ["up"]
    rf.save_pretrained(out, tmp_path / "small")
    again = Attends.from_pretrained(tmp_path / "small").eval()
    assert type(again.attention) is nn.MultiheadAttention
    with torch.no_grad():
        torch.testing.assert_close(again(x), out.model(x))

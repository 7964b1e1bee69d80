"""Models by name."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cli_networks
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from rankfold.cli._errors import LoadError, UsageError
from rankfold.cli._models import ModelSpec
from rankfold.errors import CheckpointError, DependencyError, PlanError

CPU = torch.device("cpu")


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_factory_is_called_and_put_in_eval_mode() -> None:
    model = ModelSpec.parse("cli_networks:tiny").load(seed=0, device=CPU)
    assert isinstance(model, nn.Module)
    assert not model.training
    assert same_weights(model, cli_networks.tiny())


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    spec = ModelSpec.parse("cli_networks:random_tiny")
    before = torch.random.get_rng_state()
    first, again, other = (spec.load(seed=seed, device=CPU) for seed in (1, 1, 2))
    assert same_weights(first, again)
    assert not same_weights(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cli_networks:number", "got int"),
        ("cli_networks:with_argument", "takes no arguments"),
        ("cli_networks:module", "a module"),
    ],
)
def test_a_factory_that_makes_no_module_is_bad_usage(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelSpec.parse(text).load(seed=0, device=CPU)


def test_a_factory_that_fails_is_a_failure_with_its_own_words() -> None:
    with pytest.raises(LoadError, match="no such checkpoint"):
        ModelSpec.parse("cli_networks:failing").load(seed=0, device=CPU)


@pytest.mark.parametrize("text", ["nowhere/at/all", "two words", "a:b:c", "", "c:/models"])
def test_a_name_of_nothing_is_bad_usage(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"the (name of a model|directory of a model)"):
        ModelSpec.parse(text)


def test_a_directory_without_a_model_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        ModelSpec.parse(str(tmp_path))


def test_weights_are_loaded_from_a_file(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        trained = cli_networks.Tiny()
    save_model(trained, str(tmp_path / "w.safetensors"))
    spec = ModelSpec.parse("cli_networks:tiny", weights=tmp_path / "w.safetensors")
    assert same_weights(spec.load(seed=0, device=CPU), trained)
    assert spec.origin == "file"


def test_step_counters_of_batch_norms_may_be_missing_from_a_file(tmp_path: Path) -> None:
    state = cli_networks.tiny().state_dict()
    del state["norm.num_batches_tracked"]
    save_file(state, tmp_path / "w.safetensors")
    ModelSpec.parse("cli_networks:random_tiny", weights=tmp_path / "w.safetensors").load(seed=0, device=CPU)


def _without(state: dict[str, torch.Tensor]) -> None:
    del state["head.weight"]


def _beside(state: dict[str, torch.Tensor]) -> None:
    state["more"] = torch.zeros(2)


def _wider(state: dict[str, torch.Tensor]) -> None:
    state["head.weight"] = torch.zeros(6, 17)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"1 missing \(head\.weight\)"),
        (_beside, r"1 unknown to the model \(more\)"),
        (_wider, "size mismatch"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    state = cli_networks.tiny().state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(LoadError, match=message):
        ModelSpec.parse("cli_networks:tiny", weights=tmp_path / "w.safetensors").load(seed=0, device=CPU)


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    torch.save(cli_networks.tiny().state_dict(), tmp_path / "w.pt")
    with pytest.raises(LoadError, match="weights fit"):
        ModelSpec.parse("cli_networks:tiny", weights=tmp_path / "w.pt").load(seed=0, device=CPU)


def test_weights_that_are_not_there_are_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        ModelSpec.parse("cli_networks:tiny", weights=tmp_path / "w.safetensors")


def test_a_checkpoint_needs_a_factory(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="--factory"):
        ModelSpec.parse(str(checkpoint))
    with pytest.raises(UsageError, match="another checkpoint"):
        ModelSpec.parse(str(checkpoint), factory=str(checkpoint))
    with pytest.raises(UsageError, match="leave --weights out"):
        ModelSpec.parse(str(checkpoint), factory="cli_networks:tiny", weights=checkpoint / "model.safetensors")


def test_a_factory_option_goes_with_checkpoints_only() -> None:
    with pytest.raises(UsageError, match="leave --factory out"):
        ModelSpec.parse("cli_networks:tiny", factory="cli_networks:tiny")


def test_a_checkpoint_is_loaded_by_its_factory(checkpoint: Path) -> None:
    spec = ModelSpec.parse(str(checkpoint), factory="cli_networks:random_tiny")
    model = spec.load(seed=0, device=CPU)
    assert same_weights(model, spec.load(seed=9, device=CPU))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in cli_networks.tiny().parameters())
    with pytest.raises(PlanError, match="fingerprint"):
        ModelSpec.parse(str(checkpoint), factory="cli_networks:keyword").load(seed=0, device=CPU)


def test_an_altered_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(checkpoint, altered)
    with (altered / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(CheckpointError, match="checksum"):
        ModelSpec.parse(str(altered), factory="cli_networks:tiny").load(seed=0, device=CPU)


@pytest.mark.parametrize(
    ("text", "module", "extra"),
    [("timm:resnet18", "timm", "timm"), ("torchvision:resnet18", "torchvision", "torchvision")],
)
def test_a_missing_package_names_the_extra(text: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=rf"pip install 'rankfold\[{extra}\]'"):
        ModelSpec.parse(text).load(seed=0, device=CPU)


def test_a_missing_transformers_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DependencyError, match=r"pip install 'rankfold\[transformers\]'"):
        ModelSpec.parse(str(tmp_path)).load(seed=0, device=CPU)


def test_a_torchvision_that_does_not_fit_torch_is_reported_plainly(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    done = cli("inspect", "torchvision:resnet18", "--shape", "3,32,32")
    assert (done.code, done.out) == (1, "")
    assert "operator torchvision::nms does not exist" in done.err
    assert "pip install -U torch torchvision" in done.err
    assert "Traceback" not in done.err


class Library(ModuleType):
    """Stands in for timm or torchvision.models and notes what it was asked to build."""

    def __init__(self) -> None:
        super().__init__("library")
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def list_models(self) -> list[str]:
        return ["tiny", "huge"]

    def create_model(self, name: str, **options: Any) -> nn.Module:
        self.asked.append((name, options))
        return cli_networks.random_tiny()

    get_model = create_model

    def get_model_builder(self, name: str) -> Callable[..., nn.Module]:
        def builder(*, weights: object = None, weights_backbone: object = "to be downloaded") -> nn.Module:
            raise AssertionError("only its signature is looked at")

        return builder


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library()
    for name in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    return stand_in


def test_nothing_is_ever_downloaded(library: Library) -> None:
    ModelSpec.parse("timm:tiny").load(seed=0, device=CPU)
    ModelSpec.parse("torchvision:tiny").load(seed=0, device=CPU)
    assert library.asked == [("tiny", {"pretrained": False}), ("tiny", {"weights": None, "weights_backbone": None})]


@pytest.mark.parametrize("text", ["timm:tinny", "torchvision:tinny", "timm:hf-hub:someone/tiny"])
def test_an_unknown_library_model_is_bad_usage_with_near_matches(text: str, library: Library) -> None:
    with pytest.raises(UsageError, match="'tiny'"):
        ModelSpec.parse(text).load(seed=0, device=CPU)
    assert library.asked == []


@pytest.mark.parametrize("text", ["timm:tiny", "torchvision:tiny"])
@pytest.mark.usefixtures("library")
def test_random_weights_are_said_to_be_random(text: str, cli: Any, tmp_path: Path) -> None:
    shape = ("--shape", "3,10,10")
    assert "RANDOM" in cli("inspect", text, *shape).out
    assert cli("inspect", text, *shape, "--json").json["weights"] == "random"
    save_model(cli_networks.tiny(), str(tmp_path / "w.safetensors"))
    loaded = cli("inspect", text, *shape, "--weights", tmp_path / "w.safetensors")
    assert loaded.code == 0
    assert "RANDOM" not in loaded.out


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("mended_torchvision")
@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_a_torchvision_model_is_inspected(name: str, cli: Any) -> None:
    pytest.importorskip("torchvision")
    done = cli("inspect", f"torchvision:{name}", "--shape", "3,64,64", "--json")
    assert done.code == 0, done.err
    assert len(done.json["sites"]) > 15


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("mended_torchvision")
def test_a_timm_model_is_inspected(cli: Any) -> None:
    pytest.importorskip("timm")
    done = cli("inspect", "timm:vit_tiny_patch16_224", "--shape", "3,224,224", "--json")
    assert done.code == 0, done.err
    assert len(done.json["sites"]) > 40

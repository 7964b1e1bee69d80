"""Twenty architectures as their own libraries build them, with seeded weights and inputs. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Draw = Callable[[int, torch.Generator], Any]
_definitions: list[torch.library.Library] = []  # a Library undoes its definitions when it is collected


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: What it is called on the command line and in tables.
        library: The package it comes from.
        build: Makes it, in eval mode, with whatever the global generator gives for weights.
        draw: (samples, generator) → one batch.
        samples: Samples in a batch.
        batches: Batches of calibration data.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    draw: Draw
    samples: int = 4
    batches: int = 3

    def missing(self) -> str | None:
        """Why the case cannot be built here, or None."""
        return None if importlib.util.find_spec(self.library) else f"{self.library} is not installed"

    def make(self, *, seed: int = 0) -> nn.Module:
        """The model with lively weights of a seed, in eval mode; the global generator is left as it was.

        Weights that their library starts at zero (the heads of vision transformers) are drawn instead, and batch norms
        see one batch: outputs of an untrained network that are all zero, or 1e-10, would make every check vacuous.
        """
        import_torchvision()  # all three libraries import it where it is installed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().eval()
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
            _settle(model, self.data(seed=seed)[0])
        return model

    def data(self, *, seed: int = 0) -> list[Any]:
        """Calibration batches of a seed."""
        generator = torch.Generator().manual_seed(seed)
        return [self.draw(self.samples, generator) for _ in range(self.batches)]


def _settle(model: nn.Module, batch: Any) -> None:
    """Set the running statistics of batch norms to those of one batch."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def import_torchvision() -> None:
    """Import torchvision where its compiled operators do not fit the torch at hand (a CUDA build beside a CPU torch).

    torchvision then fails at import, since it describes operators that nobody defined. Their schemas are all it needs:
    none of the classification networks calls them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        schemas = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _definitions.append(schemas)
        import torchvision  # noqa: F401


def _images(size: int) -> Draw:
    def draw(samples: int, generator: torch.Generator) -> Tensor:
        return torch.randn(samples, 3, size, size, generator=generator)

    return draw


def _pixels(size: int) -> Draw:
    def draw(samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(samples, 3, size, size, generator=generator)}

    return draw


def _tokens(vocabulary: int, length: int, *, mask: bool = False) -> Draw:
    def draw(samples: int, generator: torch.Generator) -> dict[str, Tensor]:
        ids = torch.randint(3, vocabulary, (samples, length), generator=generator)
        batch = {"input_ids": ids}
        if mask:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][0, length - 3 :] = 0
        return batch

    return draw


def _sound_and_tokens(samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(samples, 16, 64, generator=generator),
        "decoder_input_ids": torch.randint(3, 120, (samples, 6), generator=generator),
    }


def _spectra(samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"spectrogram": torch.randn(samples, 24, 16, generator=generator)}


def _source_and_target(samples: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(3, 128, (samples, 12), generator=generator),
        "decoder_input_ids": torch.randint(3, 128, (samples, 6), generator=generator),
    }


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return getattr(models, name)(weights=None, **options)

    return build


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_DECODER = {**_SMALL, "vocab_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64}

_ALL = (
    Case("resnet18", "torchvision", _torchvision("resnet18"), _images(64)),
    Case("densenet121", "torchvision", _torchvision("densenet121"), _images(64)),
    Case("shufflenet_v2_x1_0", "torchvision", _torchvision("shufflenet_v2_x1_0"), _images(64)),
    Case("googlenet", "torchvision", _torchvision("googlenet", init_weights=False), _images(64)),
    Case("mobilenet_v3_small", "torchvision", _torchvision("mobilenet_v3_small"), _images(64)),
    Case("swin_t", "torchvision", _torchvision("swin_t"), _images(64)),
    Case("vit_b_16", "torchvision", _torchvision("vit_b_16", image_size=64), _images(64)),
    Case("timm_efficientnet_b0", "timm", _timm("efficientnet_b0"), _images(64)),
    Case("timm_vit_tiny", "timm", _timm("vit_tiny_patch16_224", img_size=64), _images(64)),
    Case("timm_convnext_atto", "timm", _timm("convnext_atto"), _images(64)),
    Case(
        "hf_vit",
        "transformers",
        _transformers("ViTForImageClassification", "ViTConfig", **_SMALL, image_size=32, patch_size=8),
        _pixels(32),
    ),
    Case(
        "hf_resnet",
        "transformers",
        _transformers(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32, 64],
            depths=[1, 2, 1],
            layer_type="basic",
        ),
        _pixels(32),
    ),
    Case(
        "hf_bert",
        "transformers",
        _transformers("BertForMaskedLM", "BertConfig", **_SMALL, vocab_size=128, max_position_embeddings=64),
        _tokens(128, 16, mask=True),
    ),
    Case("hf_llama", "transformers", _transformers("LlamaForCausalLM", "LlamaConfig", **_DECODER), _tokens(128, 16)),
    Case(
        "hf_gpt2",
        "transformers",
        _transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=128,
            n_positions=64,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        ),
        _tokens(128, 16),
    ),
    Case(
        "hf_qwen3",
        "transformers",
        _transformers("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=16, tie_word_embeddings=True),
        _tokens(128, 16),
    ),
    Case(
        "hf_mixtral",
        "transformers",
        _transformers(
            # Its experts are three-dimensional parameters, which stay: few and narrow ones leave the rest a share.
            "MixtralForCausalLM",
            "MixtralConfig",
            **{**_DECODER, "intermediate_size": 32},
            num_local_experts=2,
        ),
        _tokens(128, 16),
    ),
    Case(
        "hf_whisper",
        "transformers",
        _transformers(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=128,
            num_mel_bins=16,
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            decoder_layers=2,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_source_positions=32,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        _sound_and_tokens,
    ),
    Case(
        "hf_t5",
        "transformers",
        _transformers(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=128,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        ),
        _source_and_target,
    ),
    Case(
        "hf_hifigan",
        "transformers",
        _transformers(  # a vocoder: transposed convolutions set the signal ever denser
            "SpeechT5HifiGan",
            "SpeechT5HifiGanConfig",
            model_in_dim=16,
            upsample_initial_channel=64,
            upsample_rates=[4, 2],
            upsample_kernel_sizes=[8, 4],
            resblock_kernel_sizes=[3, 5],
            resblock_dilation_sizes=[[1, 3], [1, 3, 5]],
        ),
        _spectra,
    ),
)

CASES: dict[str, Case] = {case.name: case for case in _ALL}

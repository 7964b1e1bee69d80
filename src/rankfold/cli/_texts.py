"""A text file as data, tokenised by the tokenizer beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.cli._data_options import DataOptions
from rankfold.cli._errors import LoadError, UsageError, first_line
from rankfold.cli._libraries import optional_import
from rankfold.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

READ_CHARACTERS = 2**16  # text is tokenised this much at a time, so that a limit ends the reading early


def text_batches(path: Path, options: DataOptions, tokenizer: Path | None, *, labels: bool) -> list[dict[str, Tensor]]:
    """Batches of token blocks of one length, cut from the text one after another, without special tokens."""
    import torch

    encode = _tokenizer(path, tokenizer)
    wanted = None if options.limit is None else options.limit * options.length
    tokens: list[int] = []
    try:
        with path.open(encoding="utf-8") as file:
            while (wanted is None or len(tokens) < wanted) and (lines := file.readlines(READ_CHARACTERS)):
                tokens += encode("".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
    except UnicodeDecodeError as cause:
        raise DataError(
            str(path),
            law="a file of UTF-8 text",
            got=first_line(cause),
            cure="name a text file, a .npz, a folder of images or a factory",
        ) from cause
    count = len(tokens[:wanted]) // options.length
    if count == 0:
        raise DataError(
            str(path),
            law=f"at least one block of {options.length} tokens",
            got=f"{len(tokens)} tokens",
            cure="give a longer text, or a smaller --length",
        )
    blocks = torch.tensor(tokens[: count * options.length]).view(count, options.length)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), **({"labels": part} if labels else {})}
        for part in torch.split(blocks, options.step)
    ]


def _tokenizer(path: Path, directory: Path | None) -> Any:
    if directory is None:
        raise UsageError(
            str(path),
            law="a text file needs the tokenizer of a Hugging Face directory",
            got="a model that is none",
            cure="name the model by its directory, or give token ids in a .npz",
        )
    transformers = optional_import("transformers", package="transformers", extra="transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as cause:
        raise LoadError(
            str(directory),
            law="the directory holds a tokenizer",
            got=first_line(cause),
            cure="save the tokenizer beside the model, or give token ids in a .npz",
        ) from cause

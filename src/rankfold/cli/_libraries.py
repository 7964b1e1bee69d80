"""Models out of optional packages. Nothing is ever downloaded."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankfold.cli._errors import LoadError, UsageError, first_line
from rankfold.errors import DependencyError, near_matches

if TYPE_CHECKING:
    from torch import nn


def optional_import(module: str, *, package: str, extra: str) -> Any:
    """A module of an optional package.

    Args:
        module: Dotted name of the module.
        package: Name of the package as it is installed.
        extra: Extra of rankfold that installs the package.

    Raises:
        DependencyError: The package is not installed; the extra is named.
        LoadError: The package is installed and fails at import.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as cause:
        if (cause.name or "").partition(".")[0] == module.partition(".")[0]:
            raise DependencyError(
                package, law="is installed", got="no such package", cure=f"pip install 'rankfold[{extra}]'"
            ) from cause
        failure: Exception = cause
    except Exception as cause:  # noqa: BLE001 - a package beside the wrong torch fails with all sorts of errors
        failure = cause
    raise _broken(package, failure) from failure


def _broken(package: str, cause: Exception) -> LoadError:
    """The error for an installed package that cannot be imported, most often since it was built for another torch."""
    return LoadError(
        package,
        law=f"can be imported beside torch {version('torch')}",
        got=first_line(cause),
        cure="install the builds that belong together: pip install -U "
        + " ".join(dict.fromkeys(["torch", "torchvision", package])),
    )


def make_timm(name: str) -> nn.Module:
    """A timm model with random weights; raises as `optional_import`, and `UsageError` for an unknown name."""
    timm = optional_import("timm", package="timm", extra="timm")
    if name not in (known := timm.list_models()):
        raise UsageError(f"timm:{name}", law="the name of a timm model", got=repr(name), cure=near_matches(name, known))
    model: nn.Module = _quietly(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))
    return model


def make_torchvision(name: str) -> nn.Module:
    """A torchvision model with random weights; raises as `optional_import`, and `UsageError` for an unknown name."""
    models = optional_import("torchvision.models", package="torchvision", extra="torchvision")
    if name not in (known := models.list_models()):
        raise UsageError(
            f"torchvision:{name}", law="the name of a torchvision model", got=repr(name), cure=near_matches(name, known)
        )
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None  # the default weights would be downloaded
    model: nn.Module = _quietly(f"torchvision:{name}", lambda: models.get_model(name, **options))
    return model


def _quietly(spec: str, make: Callable[[], Any]) -> Any:
    """Make a library's model, without its own warnings on how it draws random weights."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make()
    except Exception as cause:
        raise LoadError(
            spec, law="its library can build it", got=first_line(cause), cure="choose another model"
        ) from cause


def load_huggingface(directory: Path) -> nn.Module:
    """A model of the class that the directory's configuration names, with its weights; code there is never run."""
    transformers = optional_import("transformers", package="transformers", extra="transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        named = (getattr(config, "architectures", None) or [None])[0]
        cls: Any = transformers.AutoModel if named is None else getattr(transformers, named, None)
        is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if named is not None and not is_model:
            raise LoadError(
                str(directory / "config.json"),
                law="architectures names a model of the installed transformers",
                got=repr(named),
                cure=f"install the transformers that knows it (here is {transformers.__version__})",
            )
        loaded = cls.from_pretrained(str(directory), config=config, local_files_only=True, output_loading_info=True)
        model: nn.Module = loaded[0]
        missing = sorted(loaded[1]["missing_keys"])
        if missing:
            raise LoadError(
                str(directory),
                law="the directory holds every weight of the model",
                got=f"{len(missing)} missing ({', '.join(missing[:3])})",
                cure="correct architectures in config.json, or save the model again",
            )
    except LoadError:
        raise
    except ImportError as cause:
        raise _broken("transformers", cause) from cause
    except Exception as cause:
        raise LoadError(
            str(directory),
            law="transformers can load the directory",
            got=first_line(cause),
            cure="check that it holds config.json and the weights",
        ) from cause
    return model

"""Modules that register what they define are found by their names: a new one is a new file and no line elsewhere."""

import importlib
import pkgutil
from collections.abc import Iterable


def load_registering(package: str, path: Iterable[str]) -> None:
    """Import every module of a package whose name begins with an underscore.

    Args:
        package: Dotted name of the package.
        path: The package's `__path__`.
    """
    for module in pkgutil.iter_modules(path):
        if module.name.startswith("_"):
            importlib.import_module(f"{package}.{module.name}")

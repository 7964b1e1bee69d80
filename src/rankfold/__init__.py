"""rankfold: make a trained PyTorch network smaller and faster under one budget, without retraining it.

The public names stand in `__init__.pyi`, with their homes. Each is loaded when it is first used, so that `import
rankfold` and `rankfold --help` stay quick and change no global state.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Volumes for training: the HDF5 file, packing, splits, the loader. `from datasets import open_volumes, Loader`.

Both names are fetched on first use: importing this package, its layout or its packing imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets.layout import open_volumes
    from datasets.loader import Loader

__all__ = ["Loader", "open_volumes"]

_HOMES = {"Loader": "datasets.loader", "open_volumes": "datasets.layout"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'datasets' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)

"""What runs inside an allocation, and whatever needs torch; the only room that knows hpc, datasets and models3d.

`datasets` is also the name of Hugging Face's distribution, so this package checks at import that it got ours.
"""

import importlib.util
from pathlib import Path

_root = Path(__file__).resolve().parent.parent
_spec = importlib.util.find_spec("datasets")
_found = Path(_spec.origin).resolve() if _spec is not None and _spec.origin else None
if _found is None or _found.parent.parent != _root:
    raise ImportError(
        f"jobs was imported from {_root}, but datasets from {_found}. Put {_root} first on PYTHONPATH "
        f"('hpc env' prints the line), or uninstall the other package called datasets."
    )

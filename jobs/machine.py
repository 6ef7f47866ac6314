"""What this Python has for jobs, for `hpc doctor`: `python -m jobs.machine torch`, or `hdf5 FOLDER`; prints JSON."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def torch_facts() -> dict[str, Any]:
    """Versions, and the GPUs that torch sees; `error` where a CUDA build finds no device that works."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "nccl": None, "gpus": []}
    if torch.version.cuda:
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    try:
        facts["gpus"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    except RuntimeError as error:
        facts["error"] = str(error).splitlines()[0]
    return facts


def hdf5_facts(folder: Path) -> dict[str, Any]:
    """Version, and whether a file made in the folder opens again, as the loader opens it; `error` where it does not."""
    import h5py

    facts: dict[str, Any] = {"hdf5": h5py.version.hdf5_version, "h5py": h5py.__version__}
    try:
        with tempfile.TemporaryDirectory(prefix=".hpc-doctor-", dir=folder) as own:
            path = Path(own) / "probe.h5"
            with h5py.File(path, "w") as file:
                file["x"] = range(8)
            with h5py.File(path, "r", locking=False) as file:
                if file["x"][3] != 3:
                    raise OSError("it reads back other values")
    except OSError as error:
        facts["error"] = " ".join(str(error).split())
    return facts


def main() -> int:
    kind, *folder = sys.argv[1:]
    print(json.dumps(torch_facts() if kind == "torch" else hdf5_facts(Path(*folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

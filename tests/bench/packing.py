"""`hpc pack` of .nii.gz against gunzip alone, in one run: `make bench-data`. Prints ratios, asserts nothing."""

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from datasets.packing.packer import pack
from datasets.packing.recipe import PackOptions
from tests.bench.compare import Comparison

SIZE = 192


def make(folder: Path, count: int) -> int:
    """Smooth tissue with noise in air, as MRI; bytes of voxels."""
    from scipy.ndimage import gaussian_filter  # here: the packer's processes import this module, too

    draw = np.random.default_rng(0)
    for number in range(count):
        tissue = gaussian_filter(draw.normal(size=(SIZE,) * 3), 3) * 9000
        voxels = (tissue + draw.normal(size=tissue.shape) * 8).clip(0).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1.0, 1.0, 1.0])), folder / f"v{number:02d}.nii.gz")
    (folder / "labels.csv").write_text("id,label\n" + "".join(f"v{n:02d},{n % 2}\n" for n in range(count)))
    return count * SIZE**3 * 2


def gunzip(folder: Path, cores: int) -> None:
    """Each core its share of the files; what comes out is thrown away."""
    files = sorted(map(str, folder.glob("*.nii.gz")))
    shares = [
        subprocess.Popen(["gunzip", "-c", *files[core::cores]], stdout=subprocess.DEVNULL) for core in range(cores)
    ]
    for share in shares:
        share.wait()


def ours(folder: Path, out: Path, cores: int, compress: str | None) -> None:
    options = PackOptions(
        sources=(folder,), output=out / "o.h5", labels=folder / "labels.csv", workers=cores, compress=compress
    )
    pack(options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name, "in"), Path(name, "out")
        folder.mkdir()
        out.mkdir()
        size = make(folder, given.volumes)
        peer, plain, packed = f"gunzip, {cores} workers", "hpc pack", "hpc pack --compress blosc2-lz4"
        found = Comparison(
            f"packing {given.volumes} volumes of {SIZE}^3 int16, .nii.gz, {cores} cores", size / 1e6, "MB/s"
        )
        ways: dict[str, Callable[[], object]] = {
            peer: lambda: gunzip(folder, cores),
            plain: lambda: ours(folder, out, cores, None),
            packed: lambda: ours(folder, out, cores, "blosc2-lz4"),
        }
        found.run(ways, given.rounds)
    found.print()
    found.ratio(plain, peer, 0.9)
    found.ratio(packed, peer, 0.9)


if __name__ == "__main__":
    main()

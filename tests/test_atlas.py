"""An atlas gives the class of a place in the body, wherever the grid of a scan lies."""

import nibabel
import numpy as np
import pytest

from datasets.atlas import read_atlas


@pytest.fixture
def regions(tmp_path):
    (tmp_path / "regions.csv").write_text("value,label\n10,b\n300,a\n20,b\n")
    return tmp_path / "regions.csv"


def save(path, data, affine=None):
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_values_become_classes_on_another_grid(tmp_path, regions, dtype):
    values = np.array([0, 10, 20, 300])[np.arange(4)[:, None, None] + np.zeros((4, 3, 2), int)].astype(dtype)
    atlas = read_atlas(save(tmp_path / "a.nii.gz", values[::-1], np.diag([-4.0, 4, 4, 1])), regions)
    assert atlas.class_names == ["a", "b"]
    scan = np.diag([2.0, 2, 2, 1])
    scan[0, 3] = -12.0  # the left edge of the atlas
    found = atlas.classes((10, 6, 4), scan)
    assert found[:, 0, 0].tolist() == [-1, 1, 1, 1, 1, 0, 0, -1, -1, -1]
    assert (found[:, :5, :3] == found[:, :1, :1]).all() and (found[:, 5] == -1).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((4, 3, 2, 2), np.int16), r"cannot serve as an atlas: its shape is \(2, 4, 3, 2\)"),
        (np.full((4, 3, 2), np.nan, np.float32), "cannot serve as an atlas: 24 voxels are NaN"),
    ],
)
def test_what_is_no_atlas_is_told(tmp_path, regions, data, words):
    with pytest.raises(ValueError, match=words):
        read_atlas(save(tmp_path / "a.nii", data), regions)

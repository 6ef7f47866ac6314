"""The frames of DICOM files in space: their order along the normal of the slices, gaps checked, and the affine.

Standard: PS3.3 sections C.7.6.2 (image plane) and C.7.6.16 (functional groups of files with many frames).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datasets.sources.contract import UnusableSource
from datasets.sources.voxels import LPS_TO_RAS

UNEVEN, LEAST = 0.02, 0.02
"""a gap may differ from the others by this part of it, or by these mm: positions are often rounded"""
TURNED = 1e-3
"""that direction cosines of one series may differ by"""


@dataclass(frozen=True)
class Frame:
    """One slice. position: mm, LPS; directions: of growing columns and rows (6,); spacing: mm between rows, columns."""

    file: int
    index: int
    """in its file"""
    name: str
    number: int | None
    """InstanceNumber"""
    position: NDArray[np.float64] | None
    directions: NDArray[np.float64] | None
    spacing: tuple[float, float]
    slope: float
    intercept: float

    @property
    def normal(self) -> NDArray[np.float64]:
        assert self.directions is not None
        return np.cross(self.directions[:3], self.directions[3:])


@dataclass(frozen=True)
class Stack:
    """Frames in order; affine of (column, row, slice) in RAS, or for an image its pixel size on the diagonal."""

    frames: list[Frame]
    affine: NDArray[np.float64]
    volume: bool


def frames_of(file: int, name: str, data: Any) -> list[Frame]:
    """The frames of one file, in the file's order."""
    count = int(data.get("NumberOfFrames") or 1)
    if count < 1:
        raise UnusableSource(f"it has {count} frames")
    return [_frame(file, name if count == 1 else f"frame {index + 1}", data, index) for index in range(count)]


def _frame(file: int, name: str, data: Any, index: int) -> Frame:
    groups = [group for group in (_group(data, index), _group(data, None)) if group is not None]

    def value(sequence: str, word: str) -> Any:
        for group in groups:
            if group.get(sequence):
                return group[sequence][0].get(word)
        return data.get(word)

    spacing = value("PixelMeasuresSequence", "PixelSpacing") or data.get("ImagerPixelSpacing") or (1, 1)
    slope = value("PixelValueTransformationSequence", "RescaleSlope")
    intercept = value("PixelValueTransformationSequence", "RescaleIntercept")
    number = data.get("InstanceNumber")
    directions = _numbers(value("PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    return Frame(
        file,
        index,
        name,
        None if number in (None, "") else int(number),
        _position(data, index, value("PlanePositionSequence", "ImagePositionPatient"), directions),
        directions,
        (float(spacing[0]) or 1.0, float(spacing[1]) or 1.0),
        float(data.get("DoseGridScaling") or 1 if slope in (None, "") else slope),
        float(0 if intercept in (None, "") else intercept),
    )


def _group(data: Any, index: int | None) -> Any:
    """The functional groups of one frame, or those that all share."""
    found = data.get("SharedFunctionalGroupsSequence" if index is None else "PerFrameFunctionalGroupsSequence")
    return found[index or 0] if found and len(found) > (index or 0) else None


def _position(data: Any, index: int, given: Any, directions: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """Of one frame. Many frames in one file have their own, or offsets from the first (dose grids), or none."""
    position = _numbers(given, 3)
    if position is None or directions is None or int(data.get("NumberOfFrames") or 1) == 1:
        return position if directions is not None else None
    if data.get("PerFrameFunctionalGroupsSequence"):
        return position
    offsets = data.get("GridFrameOffsetVector")
    if offsets is None or len(offsets) <= index:
        return None
    return position + np.cross(directions[:3], directions[3:]) * (float(offsets[index]) - float(offsets[0]))


def _numbers(given: Any, count: int) -> NDArray[np.float64] | None:
    if given is None or len(given) != count:
        return None
    return np.array([float(number) for number in given])


def stack_frames(frames: Sequence[Frame], data: Any) -> Stack:
    """Frames sorted by place, or by number where none has one. UnusableSource where they are no even stack."""
    placed = [frame for frame in frames if frame.position is not None]
    if placed and len(placed) < len(frames):
        without = next(frame.name for frame in frames if frame.position is None)
        raise UnusableSource(f"some of its slices have no place in space: {without}, and not {placed[0].name}")
    _refuse_mixed(frames)
    thickness = abs(float(data.get("SpacingBetweenSlices") or data.get("SliceThickness") or 1.0))
    if placed:
        return _placed(frames, thickness)
    rows, columns = frames[0].spacing
    if len(frames) == 1:
        return Stack(list(frames), np.diag([rows, columns, 1.0, 1.0]), volume=False)
    return Stack(_numbered(frames), np.diag([columns, rows, thickness, 1.0]), volume=True)


def _refuse_mixed(frames: Sequence[Frame]) -> None:
    first = frames[0]
    for frame in frames:
        one, other = first.directions, frame.directions
        if one is not None and other is not None and not np.allclose(one, other, atol=TURNED):
            raise UnusableSource(
                f"its slices are not parallel: {first.name} and {frame.name}; "
                "is a localiser among them? Split the series"
            )
        if not np.allclose(first.spacing, frame.spacing, rtol=1e-3):
            raise UnusableSource(
                f"its pixels differ in size: {first.spacing} mm in {first.name}, {frame.spacing} in {frame.name}"
            )


def _numbered(frames: Sequence[Frame]) -> list[Frame]:
    """By InstanceNumber; the frames of one file stay as they are."""
    if len({frame.file for frame in frames}) == 1:
        return list(frames)
    numbers = [frame.number for frame in frames]
    if None in numbers or len(set(numbers)) < len(numbers):
        raise UnusableSource("its slices have no place in space, and no instance number each: their order is unknown")
    return sorted(frames, key=lambda frame: frame.number or 0)


def _placed(frames: Sequence[Frame], thickness: float) -> Stack:
    normal = frames[0].normal
    given = np.array([frame.position for frame in frames])
    order = np.argsort(given @ normal, kind="stable")
    along, places = [frames[number] for number in order], given[order]
    step = normal * thickness
    if len(along) > 1:
        _check_gaps(along, places @ normal)
        step = (places[-1] - places[0]) / (len(along) - 1)
        off = np.abs(places - (places[0] + np.arange(len(along))[:, None] * step)).max(axis=1)
        if off.max() > _slack(float(np.linalg.norm(step))):
            raise UnusableSource(
                f"its slices do not lie in one line: {along[int(off.argmax())].name} is {off.max():.3g} mm off"
            )
    directions, (rows, columns) = frames[0].directions, frames[0].spacing
    assert directions is not None
    affine = np.eye(4)
    affine[:3, :3] = np.stack([directions[:3] * columns, directions[3:] * rows, step], axis=1)
    affine[:3, 3] = places[0]
    return Stack(along, LPS_TO_RAS @ affine, volume=True)


def _slack(gap: float) -> float:
    return max(UNEVEN * gap, LEAST)


def _check_gaps(frames: list[Frame], along: NDArray[np.float64]) -> None:
    """UnusableSource for two slices at one place, for a slice that is missing, and for uneven gaps."""
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    for number in np.flatnonzero(gaps <= min(LEAST, usual / 2 or LEAST)):
        raise UnusableSource(
            f"two of its {len(frames)} slices lie at one place: {frames[number].name} and {frames[number + 1].name}; "
            "copies, echoes or times? Split the series"
        )
    for number in np.flatnonzero(np.abs(gaps - usual) > _slack(usual)):
        times = round(float(gaps[number] / usual))
        if times > 1 and abs(gaps[number] - times * usual) <= _slack(times * usual):
            raise UnusableSource(
                f"{times - 1} slice(s) are missing between {frames[number].name} and {frames[number + 1].name}: "
                f"{gaps[number]:.4g} mm apart, the others {usual:.4g}"
            )
        raise UnusableSource(
            f"its slices are unevenly spaced: {gaps.min():.4g} to {gaps.max():.4g} mm apart; resample it"
        )

"""What `data.augment` may say: each option's form, unit and limits, and the one-line errors for everything else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import inf
from typing import Any, Self

MAX_AXES = 3
IMAGES_ONLY = {"crop": "zoom or translate", "saturation": "contrast", "hue": "brightness"}
"""options for images only, and what to write for volumes"""

AMOUNTS = {"rotate": 180.0, "shear": 60.0, "translate": 1.0, "hue": 0.5}
"""number a (drawn from +-a) or a list of one for each axis, and the most it may be"""
RANGES = {
    "zoom": (0.1, 10.0),
    "gamma": (0.1, 10.0),
    "contrast": (0.0, 10.0),
    "brightness": (0.0, 10.0),
    "saturation": (0.0, 10.0),
    "crop": (0.01, 1.0),
    "blur": (0.0, 32.0),
    "low_resolution": (1.0, 32.0),
}
"""[low, high] and the limits; one number is short for what `_short` says"""
FOLDING = {2: 2.046, 3: 2.48}
"""a deformation of under spacing / this cannot fold (Choi and Lee, Injectivity conditions of 2D and 3D uniform cubic
B-spline functions, Graphical Models 62, 2000)"""
PRESETS: dict[str, dict[str, Any]] = {
    "volumes": {
        "rotate": 30,
        "zoom": [0.7, 1.4],
        "noise": 0.3,
        "blur": [0.5, 1.0],
        "brightness": [0.75, 1.25],
        "contrast": [0.75, 1.25],
        "low_resolution": [1, 2],
        "gamma": [0.7, 1.5],
        "p": {
            "rotate": 0.2,
            "zoom": 0.2,
            "noise": 0.1,
            "blur": 0.2,
            "brightness": 0.15,
            "contrast": 0.15,
            "low_resolution": 0.25,
            "gamma": 0.3,
        },
    },
    "images": {"crop": [0.25, 1], "flip": [1], "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.05},
}
"""`preset:`, which other keys override. volumes: the numbers of nnU-Net v2's default trainer, without its flips (only
you know whether left and right mean something); images: those usual for photographs, flip left-right"""


@dataclass(frozen=True)
class Options:
    """The options of Augment; its docstring says what each does. ValueError for bad values.

    After __init__, amounts are tuples of one number or one for each axis, ranges are (low, high); () is off.
    """

    flip: Any = ()
    scale: float = 0.0
    shift: float = 0.0
    noise: float = 0.0
    rotate: Any = ()
    zoom: Any = ()
    shear: Any = ()
    translate: Any = ()
    spacing: Any = ()
    elastic: Any = ()
    crop: Any = ()
    blur: Any = ()
    low_resolution: Any = ()
    gamma: Any = ()
    contrast: Any = ()
    brightness: Any = ()
    saturation: Any = ()
    hue: Any = ()
    cutout: Any = ()
    p: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._keep("flip", _flip(self.flip))
        for name in ("scale", "shift", "noise"):
            if not _is_number(getattr(self, name)):
                raise ValueError(
                    f"augment: {name} {getattr(self, name)!r} is not a number; write for example {name}: 0.1"
                )
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"augment: {name} {getattr(self, name)} must be 0 (off) or more")
        for name, most in AMOUNTS.items():
            self._keep(name, _amounts(name, getattr(self, name), 0, most))
        for name in RANGES:
            self._keep(name, _range(name, getattr(self, name)))
        self._keep("spacing", _amounts("spacing", self.spacing, 1e-6, inf))
        if self.spacing and not (self.rotate or self.shear):
            raise ValueError("augment: spacing serves rotate and shear, and neither is given; leave it out")
        self._keep("elastic", _part("elastic", self.elastic, Elastic))
        self._keep("cutout", _part("cutout", self.cutout, Cutout))
        self._refuse_idle()
        self._keep("p", self._chances(self.p))

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _refuse_idle(self) -> None:
        """What is given and does nothing. Off is 0, null or []."""
        for name in RANGES:
            neutral = 0.0 if name == "blur" else 1.0
            if getattr(self, name) == (neutral, neutral):
                raise ValueError(f"augment: {name} [{neutral:g}, {neutral:g}] does nothing; leave it out")

    def _chances(self, chances: Any) -> dict[str, float]:
        if not isinstance(chances, Mapping):
            raise ValueError(f"augment: p {chances!r} is no mapping; write for example p: {{rotate: 0.2, gamma: 0.3}}")
        on = [name for name in names(Options) if name not in ("p", "spacing") and getattr(self, name)]
        for name, chance in chances.items():
            if name not in on:
                hint = _nearest(name, on)
                raise ValueError(f"augment: p names {name!r}, which is not on; {hint}on are: {', '.join(on) or 'none'}")
            if not _is_number(chance) or not 0 <= chance <= 1:
                raise ValueError(f"augment: p of {name}, {chance!r}, is a probability: use 0 to 1")
        return dict(chances)

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """From the `augment:` of an experiment; ValueError names an unknown key and the nearest valid one."""
        merged = dict(options)
        if (preset := merged.pop("preset", None)) is not None:
            if not isinstance(preset, str) or preset not in PRESETS:
                raise ValueError(f"augment: preset {preset!r} is unknown; presets are {', '.join(PRESETS)}")
            merged = _overridden(PRESETS[preset], merged)
        check_names("augment", merged, [*names(cls), "preset"])
        return cls(**merged)

    def check(self, spatial_axes: int, channels: int) -> None:
        """ValueError for what cannot take effect on samples of so many spatial axes (2: images, 3) and channels."""
        kind = "images" if spatial_axes == 2 else "volumes"
        beyond = [axis for axis in self.flip if axis >= spatial_axes]
        if beyond:
            raise ValueError(
                f"augment: flip axis {beyond[0]} is over the spatial axes of {kind}, 0 to {spatial_axes - 1}"
            )
        for name, instead in IMAGES_ONLY.items():
            if getattr(self, name) and spatial_axes != 2:
                raise ValueError(f"augment: {name} is for images, and these are volumes; use {instead}")
        for name in ("saturation", "hue"):
            if getattr(self, name) and channels != 3:
                raise ValueError(f"augment: {name} needs 3 channels (red, green, blue), and these have {channels}")
        angles = 1 if spatial_axes == 2 else spatial_axes
        for name, value, wanted in (
            ("rotate", self.rotate, angles),
            ("shear", self.shear, angles),
            ("translate", self.translate, spatial_axes),
            ("hue", self.hue, 1),
            ("spacing", self.spacing, spatial_axes),
            ("elastic spacing", self.elastic and self.elastic.spacing, spatial_axes),
            ("elastic magnitude", self.elastic and self.elastic.magnitude, spatial_axes),
        ):
            if len(value) not in (0, 1, wanted):
                many = "1 number" if wanted == 1 else f"1 number or {wanted}"
                raise ValueError(f"augment: {name} {list(value)} has {len(value)} numbers; {kind} take {many}")
        if self.elastic:
            self.elastic.check(spatial_axes)


@dataclass(frozen=True)
class Elastic:
    """spacing of the control points and the largest shift along each axis, both in voxels; tuples as the amounts."""

    spacing: Any
    magnitude: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "spacing", _amounts("elastic spacing", self.spacing, 2, inf))
        object.__setattr__(self, "magnitude", _amounts("elastic magnitude", self.magnitude, 0, inf))
        if not self.magnitude:
            raise ValueError("augment: elastic magnitude 0 does nothing; leave elastic out")

    def check(self, spatial_axes: int) -> None:
        """ValueError where the deformation could fold the image."""
        spacing, magnitude = per_axis(self.spacing, spatial_axes), per_axis(self.magnitude, spatial_axes)
        for gap, shift in zip(spacing, magnitude, strict=True):
            if shift * FOLDING[spatial_axes] >= gap:
                most = gap / FOLDING[spatial_axes]
                raise ValueError(
                    f"augment: elastic magnitude {shift:g} can fold the sample; "
                    f"with spacing {gap:g} it must be less than {most:.3g}"
                )


@dataclass(frozen=True)
class Cutout:
    """holes: how many boxes; size: of the length of each axis, a number or [low, high]; fill: intensity."""

    holes: int = 1
    size: Any = (0.2, 0.2)
    fill: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.holes, int) or isinstance(self.holes, bool) or not 1 <= self.holes <= 64:
            raise ValueError(f"augment: cutout holes {self.holes!r} must be a whole number from 1 to 64")
        size = (self.size, self.size) if _is_number(self.size) else self.size
        object.__setattr__(self, "size", _pair("cutout size", size, 0.001, 1.0, "0.2 or [0.1, 0.3]"))
        if not _is_number(self.fill):
            raise ValueError(f"augment: cutout fill {self.fill!r} is not a number, of normalised intensity")


def per_axis(values: tuple[float, ...], axes: int) -> tuple[float, ...]:
    """One number for all axes, or one each, as one each."""
    return values * axes if len(values) == 1 else values


def names(options: type) -> list[str]:
    return [entry.name for entry in fields(options)]


def check_names(where: str, options: Mapping[Any, Any], good: Sequence[str]) -> None:
    for key in options:
        if key not in good:
            raise ValueError(f"{where}: {key!r} is unknown; {_nearest(key, good)}it takes {', '.join(good)}")


def _nearest(name: Any, good: Sequence[str]) -> str:
    close = get_close_matches(str(name), good, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _overridden(preset: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The preset with the user's keys; what is switched off (0, null, []) loses its probability, too."""
    merged = {**preset, **{key: value for key, value in options.items() if key != "p"}}
    on = {key: value for key, value in merged.items() if not _is_off(value)}
    chances = {key: chance for key, chance in preset.get("p", {}).items() if key in on}
    given = options.get("p", {})
    return {**on, "p": {**chances, **given} if isinstance(given, Mapping) else given}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < inf


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, (list, tuple, dict)) and not value) or (_is_number(value) and value == 0)


def _flip(axes: Any) -> tuple[int, ...]:
    if not isinstance(axes, (list, tuple)):
        raise ValueError(f"augment: flip {axes!r} is not a list of axes; write for example flip: [0]")
    known = [axis for axis in axes if type(axis) is int and 0 <= axis < MAX_AXES]
    if len(known) < len(axes) or len(set(known)) < len(known):
        raise ValueError(f"augment: flip {list(axes)} must name spatial axes once each, from 0, 1 and 2")
    return tuple(axes)


def _amounts(name: str, value: Any, least: float, most: float) -> tuple[float, ...]:
    if _is_off(value):
        return ()
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not all(_is_number(number) and least <= number <= most for number in numbers):
        limits = f"from {least:g} to {most:g}" if most < inf else f"of {least:g} or more"
        raise ValueError(f"augment: {name} {value!r} must be a number {limits}, or a list of one for each axis")
    if not any(numbers):
        raise ValueError(f"augment: {name} {value!r} does nothing; leave it out")
    return tuple(float(number) for number in numbers)


def _range(name: str, value: Any) -> tuple[float, ...]:
    low, high = RANGES[name]
    if _is_off(value):
        return ()
    short = {"blur": "1.0", "low_resolution": "2", "crop": "0.3"}.get(name, "0.2")
    return _pair(name, _short(name, value), low, high, f"{short} or [low, high]")


def _short(name: str, value: Any) -> Any:
    """One number as a range: blur 0 to it, low_resolution 1 to it, crop it to 1, factors 1 - it to 1 + it."""
    if not _is_number(value):
        return value
    if name in ("blur", "low_resolution"):
        return [RANGES[name][0], value]
    return [value, 1.0] if name == "crop" else [1 - value, 1 + value]


def _pair(name: str, value: Any, low: float, high: float, example: str) -> tuple[float, float]:
    numbers = value if isinstance(value, (list, tuple)) else ()
    if len(numbers) != 2 or not all(_is_number(number) for number in numbers):
        raise ValueError(
            f"augment: {name} {value!r} is no range; write for example {name.rsplit(maxsplit=1)[-1]}: {example}"
        )
    if not low <= numbers[0] <= numbers[1] <= high:
        raise ValueError(f"augment: {name} {list(numbers)} must lie in {low:g} to {high:g}, the smaller number first")
    return float(numbers[0]), float(numbers[1])


def _part(name: str, value: Any, kind: type[Elastic] | type[Cutout]) -> Any:
    keys = names(kind)
    if isinstance(value, Mapping) and not value:
        raise ValueError(f"augment: {name} {{}} says nothing; it takes {', '.join(keys)}, or null for none")
    if isinstance(value, kind) or _is_off(value):
        return () if _is_off(value) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"augment: {name} {value!r} is no mapping; it takes {', '.join(keys)}")
    check_names(f"augment: {name}", value, keys)
    missing = [key for key in ("spacing", "magnitude") if key in keys and key not in value]
    if missing:
        raise ValueError(
            f"augment: {name} lacks {missing[0]}; write for example elastic: {{spacing: 32, magnitude: 4}}"
        )
    return kind(**value)

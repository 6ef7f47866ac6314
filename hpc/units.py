"""Durations and sizes as people write them: 8h, 5min, 1-12:00:00, 60GB; kept as seconds and decimal GB; percentiles."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "days": 86400}
_GIGABYTES = {"": 1.0, "GB": 1.0, "G": 1.0, "MB": 1e-3, "M": 1e-3, "TB": 1e3, "T": 1e3, "GIB": 1.073741824}
_LEAST_GB = 1e-3  # SLURM counts in MB, and --mem=0 means the whole node


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that a share of 0 to 1 of them do not exceed; 0 for none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else 0.0


def seconds(value: object) -> int:
    """Seconds from `90`, `90s`, `5min`, `8h`, `1h30min`, `2d`, or SLURM's `[days-]hours:minutes:seconds`.

    Raises ValueError with the accepted forms.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        total = int(value) if math.isfinite(value) else 0
    else:
        total = _parse_seconds(str(value).strip())
    if total <= 0:
        raise ValueError(f"{value!r} is not a duration above zero; write 90s, 5min, 8h, 2d or 1-12:00:00")
    return total


def _parse_seconds(text: str) -> int:
    if re.fullmatch(r"\d+", text):
        return int(text)
    if clock := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text):
        days, hours, minutes, secs = (int(part or 0) for part in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + secs
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text)
    if (
        not parts
        or "".join(f"{n}{u}" for n, u in parts) != text.replace(" ", "")
        or any(u not in _SECONDS for _, u in parts)
    ):
        raise ValueError(f"{text!r} is not a duration; write 90s, 5min, 8h, 2d or 1-12:00:00")
    return int(sum(float(number) * _SECONDS[unit] for number, unit in parts))


def gigabytes(value: object) -> float:
    """Decimal gigabytes from `60`, `60GB`, `500MB`, `1.5T`. Raises ValueError with the accepted forms."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    size = float(match[1]) * _GIGABYTES.get(match[2].upper(), 0) if match else 0.0
    if not _LEAST_GB <= size < math.inf:
        raise ValueError(f"{value!r} is not a size of 1 MB or more; write 60GB, 500MB or a number of GB")
    return size


def slurm_time(total: int) -> str:
    """SLURM's `days-hours:minutes:seconds` (days only when there are some)."""
    minutes, secs = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02d}:{minutes:02d}:{secs:02d}"
    return f"{days}-{clock}" if days else clock


def short_time(total: float) -> str:
    """A duration for people: 42 s, 5 min, 3.2 h, 2.5 d."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if total < limit:
            return f"{total / unit:.1f} {name}" if unit == 3600 else f"{total / unit:.0f} {name}"
    return f"{total / 86400:.1f} d"

"""Efficiency card of a run: cores, memory, GPUs and time used, of those asked for, and a request that would have done.

Read from what hpc/sampler.py left of every attempt and node, and from the training's own records.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from hpc.errors import UserError
from hpc.rundir import RunDir, read_json
from hpc.units import short_time

_HEADROOM = 1.2
_ENOUGH_S, _FEW_S = 60, 600
"""Sampled for less than the first: no suggestion; than the second: one with a warning."""
_NEAR = 0.9
_WAITING = 0.1
_SHOWN_GPUS = 4
_NUMBERS = ("generation", "seconds", "cpu_seconds", "memory_peak_gb")
_OTHERS = {"node", "busiest_cores", "memory_limit_gb", "asked", "gpus"}
"""What a record has."""


def summary(run: RunDir, finished: bool | None = None) -> dict[str, Any]:
    """What the run used over all attempts and nodes; {} where nothing was sampled.

    Keys: attempts, nodes, seconds (of all attempts), longest_s, cores (busy, a node's mean), busiest_cores,
    memory_peak_gb (of a node), memory_limit_gb, asked, gpus, waiting_share, suggested ({dotted key: value}).
    `finished` is for a run whose result.json is about to be written.
    """
    records = _records(run)
    if not records:
        return {}
    spans: dict[int, float] = {}
    for record in records:
        spans[record["generation"]] = max(spans.get(record["generation"], 0.0), record["seconds"])
    sampled = sum(record["seconds"] for record in records)
    cores = sum(record["cpu_seconds"] for record in records) / sampled if sampled else 0.0
    newest = max(records, key=lambda record: record["generation"])
    found = {
        "attempts": len(spans),
        "nodes": len({record["node"] for record in records}),
        "seconds": round(sum(spans.values()), 1),
        "longest_s": round(max(spans.values()), 1),
        "cores": round(cores, 2),
        "busiest_cores": max([record["busiest_cores"] or 0.0 for record in records]) or round(cores, 2),
        "memory_peak_gb": max(record["memory_peak_gb"] for record in records),
        "memory_limit_gb": newest["memory_limit_gb"],
        "asked": newest["asked"],
        "gpus": _gpus(records),
        "waiting_share": _waiting(run),
    }
    return {**found, "suggested": _suggestion(found, run.result.exists() if finished is None else finished)}


def _records(run: RunDir) -> list[dict[str, Any]]:
    """One per attempt and node; the file of a node that broke, and what is no record of the sampler, is left out."""
    records = []
    for path in sorted(run.usage.glob("[0-9]*.json")):
        try:
            records.append(read_json(path))
        except UserError:
            continue
    return list(filter(_whole, records))


def _whole(record: dict[str, Any]) -> bool:
    return record.keys() >= _OTHERS and all(isinstance(record.get(key), int | float) for key in _NUMBERS)


def _gpus(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The GPUs of the job by place: an attempt's nodes and their GPUs in order, whatever their numbers were."""
    places: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for generation in {record["generation"] for record in records}:
        nodes = [record for record in records if record["generation"] == generation]
        for node, record in enumerate(sorted(nodes, key=lambda record: str(record["node"]))):
            for number, gpu in enumerate(record["gpus"]):
                places.setdefault((node, number), []).append(gpu)
    return [_merge(number, seen) for (_, number), seen in sorted(places.items())]


def _merge(number: int, seen: list[dict[str, Any]]) -> dict[str, Any]:
    samples = sum(gpu["samples"] for gpu in seen)
    return {
        "gpu": number,
        "samples": samples,
        "busy": round(sum(gpu["busy"] * gpu["samples"] for gpu in seen) / samples, 4),
        "peak_gb": max(gpu["peak_gb"] for gpu in seen),
        "total_gb": max(gpu["total_gb"] for gpu in seen),
    }


def _waiting(run: RunDir) -> float | None:
    shares = [line["waiting_share"] for line in run.read_metrics() if line.get("waiting_share") is not None]
    return round(statistics.median(shares), 4) if shares else None


def _suggestion(found: dict[str, Any], finished: bool) -> dict[str, str]:
    """The launch section that would have done, where it differs from the one asked for."""
    asked, suggested = found["asked"], {}
    if found["seconds"] < _ENOUGH_S or not asked:
        return {}
    peak, limit = found["memory_peak_gb"], asked["mem_gb"]
    memory = max(math.ceil(peak * _HEADROOM), 1)
    if memory < _NEAR * limit or peak > _NEAR * limit:
        suggested["launch.mem"] = f"{memory}GB"
    tasks = int(asked["tasks_per_node"])
    cpus = math.ceil(max(found["busiest_cores"] * _HEADROOM, 1) / tasks) * tasks
    if cpus < asked["cpus"] and (found["waiting_share"] or 0) < _WAITING:
        suggested["launch.cpus"] = str(cpus)
    needed = found["seconds"] * _HEADROOM
    if finished and _rounded(needed)[0] < asked["time_s"]:
        suggested["launch.time"] = _rounded(needed)[1]
    return suggested


def _rounded(seconds: float) -> tuple[int, str]:
    """A time limit of at least so long: whole hours, or from ten minutes on in steps of ten."""
    if seconds > 7200:
        hours = math.ceil(seconds / 3600)
        return hours * 3600, f"{hours}h"
    minutes = math.ceil(seconds / 600) * 10
    return minutes * 60, f"{minutes}min"


def card(run: RunDir, finished: bool | None = None) -> list[str]:
    """The summary in lines for people, the last one with the request that would have done; [] where there is none."""
    return lines(summary(run, finished))


def lines(found: dict[str, Any]) -> list[str]:
    """The card of a summary, as result.json keeps it under `usage`."""
    if not found:
        return []
    asked = found["asked"]
    cpus = f" of {asked['cpus']} cores ({found['cores'] / asked['cpus']:.0%})" if asked else " cores"
    limit = found["memory_limit_gb"]
    said = [
        f"CPU {found['cores']:.1f}{cpus}",
        f"memory {found['memory_peak_gb']:.3g}{f' of {limit:.3g}' if limit else ''} GB at most",
        *_gpu_lines(found["gpus"]),
    ]
    waiting = found["waiting_share"]
    if waiting is not None:
        help = ": more data.threads, or launch.cpus, would help" if waiting >= _WAITING else ""
        said.append(f"waiting for data {waiting:.0%}{help}")
    return [*(line.replace("%", " %") for line in said), _time_line(found), _suggestion_line(found)]


def _gpu_lines(gpus: list[dict[str, Any]]) -> list[str]:
    if len(gpus) > _SHOWN_GPUS:
        mean, least = statistics.mean(gpu["busy"] for gpu in gpus), min(gpu["busy"] for gpu in gpus)
        peak, total = max(gpu["peak_gb"] for gpu in gpus), max(gpu["total_gb"] for gpu in gpus)
        return [f"{len(gpus)} GPUs: {mean:.0%} busy, the least {least:.0%}, {peak:.3g} of {total:.3g} GB at most"]
    return [
        f"GPU {gpu['gpu']}: {gpu['busy']:.0%} busy, {gpu['peak_gb']:.3g} of {gpu['total_gb']:.3g} GB at most"
        for gpu in gpus
    ]


def _time_line(found: dict[str, Any]) -> str:
    asked = f" of {short_time(found['asked']['time_s'])} asked" if found["asked"] else ""
    if found["attempts"] == 1:
        return f"wall time {short_time(found['seconds'])}{asked}"
    longest = f"the longest {short_time(found['longest_s'])}{asked}"
    return f"wall time {short_time(found['seconds'])} in {found['attempts']} attempts, {longest}"


def _suggestion_line(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    if seconds < _ENOUGH_S or not found["asked"]:
        return f"no request suggested: sampled for {short_time(seconds)} only"
    if not found["suggested"]:
        return "the request fits what was used"
    words = " ".join(f"{key}={value}" for key, value in found["suggested"].items())
    few = f"; a guess, from {short_time(seconds)} only" if seconds < _FEW_S else ""
    return f"suggested: {words} (what was used and 20 % more{few})"

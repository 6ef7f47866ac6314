"""What this machine does with an experiment: `python -m jobs.bench step|loader|all`, the experiment on standard input.

It is measured on one process with its share of a batch: the model's step on one fixed batch, the loader alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from hpc import instances, steptimes, tables, yamlfile
from hpc.allocation import Allocation
from hpc.errors import UserError
from hpc.experiment import Experiment, validate
from hpc.preempt import ExitCode, StopFlag
from hpc.rundir import RunDir
from jobs import flops, measured, virtual, waiting
from jobs.engine import BadNode, Engine, choose_device
from jobs.memory_plan import NotPlanned, plan_memory
from jobs.setup import Parts, make_loaders
from jobs.train import Trainer, wants_determinism

_WARM_STEPS = 2
_WARM_SHARE = 0.25
"""Of the time, at most, for what is not measured: compilation, the choice of kernels, filling the page cache."""


def one_process(experiment: Experiment, processes: int) -> Experiment:
    """The experiment as one of its processes sees it, alone. Raises UserError where the batch does not divide."""
    if fault := experiment.batch_fault(processes):
        raise UserError(fault)
    train, data, launch = experiment.train, experiment.data, experiment.launch
    alone: dict[str, Any] = {"strategy": "single", "zero": None, "sync_batchnorm": False, "ledger": False}
    alone |= {"profile": None, "virtual_ranks": max(train.virtual_ranks // processes, 1)}
    share = {"batch_size": data.batch_size // processes, "stage": "none"}
    place = {"nodes": 1, "tasks_per_node": None, "gpus": min(launch.gpus or 1, 1) if launch.gpus else launch.gpus}
    return experiment.model_copy(
        update={
            "train": train.model_copy(update=alone),
            "data": data.model_copy(update=share),
            "launch": launch.model_copy(update=place),
        }
    )


def make_engine(experiment: Experiment, allocation: Allocation) -> Engine:
    """Of one process. Raises BadNode."""
    device = choose_device(experiment.train.device, allocation)
    threads = virtual.THREADS if experiment.train.deterministic == "layout" and device.type == "cpu" else 0
    alone = replace(allocation, rank=0, world_size=1, generation=1)
    return Engine(alone, device, wants_determinism(experiment, device), "bench", threads)


def measure_step(trainer: Trainer, seconds: float, steps: int) -> dict[str, Any]:
    """Training steps on one batch, after a few that do not count: times by part, samples/s, FLOP/s, peak memory."""
    trainer.learner.started()
    update, clock, device = trainer.learner.update, trainer.clock, trainer.engine.device
    iterator = iter(trainer.loader)
    batch = next(iterator)
    iterator.close()

    def run(most: int, until: float) -> int:
        done = 0
        while done < most and (not done or perf_counter() < until):
            update.gradients(batch, 0)
            update.apply()
            clock.end(0.0)
            done += 1
        _synchronize(device)
        return done

    began = perf_counter()
    run(_WARM_STEPS, began + _WARM_SHARE * seconds)
    clock.flush(trainer.engine)
    clock.begin(0.0)
    began = perf_counter()
    done = run(steps, began + (1 - _WARM_SHARE) * seconds)
    rate = done * len(batch.samples) / (perf_counter() - began)
    work = flops.work_of(trainer.experiment, trainer.parts, trainer.engine)
    found: dict[str, Any] = {"steps": done, steptimes.SECONDS: clock.flush(trainer.engine), "samples_per_second": rate}
    return {**found, **work.rates(0, rate), "memory": _memory(trainer)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory(trainer: Trainer) -> dict[str, Any]:
    """Bytes: `peak_allocated` on a GPU, else `peak_rss` of the whole process; `predicted` of these steps' tensors;
    `planned`, what hpc plan says of one process: with the validation, and the batches on their way to the GPU.
    """
    device, experiment = trainer.engine.device, trainer.experiment
    if device.type == "cuda":
        found: dict[str, Any] = {"peak_allocated": torch.cuda.max_memory_allocated(device)}
    else:
        found = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    try:
        with torch.device("meta"):
            model = trainer.parts.build_model(experiment.model.name)
        plan = plan_memory(experiment, trainer.parts, model, details=False)
    except (NotPlanned, UserError):
        return {**found, "predicted": None, "planned": None}
    return {**found, "predicted": plan.estimate.training, "planned": plan.peak}


def measure_loader(experiment: Experiment, parts: Parts, engine: Engine, seconds: float) -> list[dict[str, Any]]:
    """The loader alone, warm, by number of threads: samples/s, and GB/s of the numbers as stored, unpacked."""
    cores = engine.allocation.cpus_per_task or len(os.sched_getaffinity(0))
    several = sorted({0, experiment.data.threads, cores})
    _read(experiment, parts, engine, experiment.data.threads, _WARM_SHARE * seconds)
    each = (1 - _WARM_SHARE) * seconds / len(several)
    return [{"threads": threads, **_read(experiment, parts, engine, threads, each)} for threads in several]


def _read(experiment: Experiment, parts: Parts, engine: Engine, threads: int, seconds: float) -> dict[str, float]:
    """Epoch after epoch, until the time is over."""
    data = experiment.data.model_copy(update={"threads": threads})
    one = experiment.model_copy(update={"data": data})
    with make_loaders(one, parts, engine.device, seed=experiment.train.seed)[0] as loader:
        began, samples, size = perf_counter(), 0, 0
        while perf_counter() < began + seconds:
            for batch in loader:
                samples += len(batch.samples)
                size += batch.inputs.numel() * parts.volumes.dtype.itemsize
                del batch
                if perf_counter() >= began + seconds:
                    break
        _synchronize(engine.device)
        took = perf_counter() - began
    return {"samples_per_second": samples / took, "gb_per_second": size / took / 1e9}


def _foreign(experiment: Experiment, engine: Engine) -> str | None:
    """Why what is measured here says nothing of the experiment's instance; None where it does."""
    instance = instances.find(experiment.launch.instance)
    wants_gpu = bool(instance.request(experiment.launch).gpus) and experiment.train.device != "cpu"
    if wants_gpu and engine.device.type != "cuda":
        return f"{instance.name} has a GPU, this machine has none"
    if not engine.allocation.job_id and instance.cpus != len(os.sched_getaffinity(0)):
        return f"this is no allocation of {instance.name}"
    return None


def run(experiment: Experiment, what: str, seconds: float, steps: int) -> dict[str, Any]:
    """All that is measured, as `--json` prints it. Raises UserError, ValueError, BadNode."""
    allocation, processes = Allocation.current(), measured.processes(experiment)
    alone = one_process(experiment, processes)
    engine = make_engine(alone, allocation)
    found: dict[str, Any] = {
        "experiment": experiment.name,
        "model": experiment.model.name,
        "instance": experiment.launch.instance,
        "device": engine.device.type if engine.device.type == "cpu" else torch.cuda.get_device_name(engine.device),
        "precision": experiment.train.precision,
        "processes": processes,
        "batch": alone.data.batch_size,
    }
    with tempfile.TemporaryDirectory(prefix="hpc-bench-") as folder:
        trainer = Trainer(RunDir(Path(folder) / "run"), alone, engine, StopFlag())
        found["precision"] = trainer.experiment.train.precision  # auto: what was found
        try:
            if what != "loader":
                found["step"] = measure_step(trainer, seconds, steps)
            if what != "step":
                found["loader"] = measure_loader(alone, trainer.parts, engine, seconds)
        finally:
            trainer.leave_data()
    if what == "all":
        found["verdict"] = _verdict(found, experiment.data.threads)
    found["not_kept"] = _foreign(experiment, engine) or _keep(experiment, trainer.parts, found)
    return found


def _verdict(found: dict[str, Any], threads: int) -> dict[str, Any]:
    loader = next(row["samples_per_second"] for row in found["loader"] if row["threads"] == threads)
    model, device = found["step"]["samples_per_second"], "CPU" if found["device"] == "cpu" else "GPU"
    busy, words = waiting.verdict(loader, model, device)
    text = f"the loader gives {waiting.number(loader)} samples/s, the model takes {waiting.number(model)}: {words}"
    best = max(found["loader"], key=lambda row: float(row["samples_per_second"]))
    if not busy:
        more = f"data.threads={best['threads']} gives {waiting.number(best['samples_per_second'])}"
        text += f"; {waiting.REMEDY if best['threads'] == threads else more}"
    return {"kept_busy": busy, "words": text}


def _keep(experiment: Experiment, parts: Parts, found: dict[str, Any]) -> str | None:
    """For hpc plan; what went wrong, if anything did."""
    facts = {"device": found["device"], "torch": torch.__version__}
    try:
        for row in found.get("loader", ()):
            measured.keep(measured.loader_key(experiment, parts, row["threads"]), row["samples_per_second"], **facts)
        if step := found.get("step"):
            measured.keep(measured.model_key(experiment, parts), step["samples_per_second"], **facts)
    except OSError as error:
        return f"{measured.folder()} cannot be written: {error.strerror}"
    return None


def show(found: dict[str, Any]) -> None:
    """For people."""
    several = found["processes"]
    share = f", one of {several} processes, without their exchange of gradients" if several > 1 else ""
    print(f"{found['model']} on {found['device']}, {found['precision']}, batch {found['batch']}{share}")
    if step := found.get("step"):
        rows = [
            {"part": part, "time": steptimes.milliseconds(seconds), "share": f"{share:.1%}"}
            for part, seconds, share in steptimes.rows(step)
            if seconds
        ]
        print()
        tables.print_rows(rows, 100, ())
        whole = steptimes.milliseconds(step[steptimes.SECONDS][steptimes.STEP])
        computing = steptimes.compute(step)
        speed = f"{waiting.number(step['samples_per_second'])} samples/s{f', {computing}' if computing else ''}"
        print(f"step {whole} (mean of {step['steps']}): {speed}\n{_memory_line(step['memory'])}")
    if loaded := found.get("loader"):
        print()
        named = {"samples_per_second": "samples/s", "gb_per_second": "GB/s"}
        cells = [
            {"loader threads": str(row["threads"]), **{title: f"{row[key]:.3g}" for key, title in named.items()}}
            for row in loaded
        ]
        tables.print_rows(cells, 100, ())
    if verdict := found.get("verdict"):
        print(f"\n{verdict['words']}")
    if found["not_kept"]:
        print(f"not kept for hpc plan: {found['not_kept']}")


def _memory_line(memory: dict[str, Any]) -> str:
    guess = memory["predicted"]
    predicted = "no prediction for this model"
    if guess:
        predicted = f"{guess / 1e9:.3g} GB predicted of the tensors, {memory['planned'] / 1e9:.3g} GB by hpc plan"
    if "peak_allocated" in memory:
        return f"peak memory {memory['peak_allocated'] / 1e9:.3g} GB allocated on the GPU, {predicted}"
    return f"peak memory {memory['peak_rss'] / 1e9:.3g} GB of the whole process, libraries too; {predicted}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench", description=__doc__)
    parser.add_argument("what", choices=("step", "loader", "all"))
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if Allocation.current().rank:  # one process measures; srun may have started more
        return ExitCode.DONE
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        experiment = validate(yamlfile.parse(sys.stdin.read(), "experiment"), "experiment")
        found = run(experiment, given.what, given.seconds, given.steps)
    except (UserError, ValueError, BadNode) as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        print("stopped: nothing is kept for hpc plan", file=sys.stderr)
        return 128 + signal.SIGINT
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())

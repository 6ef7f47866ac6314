"""Run folders for the tests of sinks: event files and records of a made-up training, attempt by attempt."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from hpc.logs.records import frame
from hpc.rundir import RunDir, append_line, write_json

BEGAN = 1_795_000_000.0
EXPERIMENT = {
    "name": "tiny",
    "task": "classification",
    "model": {"name": "resnet3d", "hidden": [64, 32]},
    "train": {"epochs": 3, "optimizer": {"lr": 0.003}, "class names @ (odd)": "a#b"},
    "launch": {"instance": "laptop", "time": 3600},
}


def png() -> bytes:
    """A picture of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


class FakeRun:
    """A run as training leaves it; each step is one second."""

    def __init__(self, runs: Path, name: str = "tiny-1a2b3c4d", began: float = BEGAN, name_of: str = "tiny") -> None:
        self.dir = RunDir(runs / name)
        self.dir.tensorboard.mkdir(parents=True)
        self.began = began
        self.generation = 0
        self.clock = began
        self.dir.experiment.write_text(yaml.safe_dump({**EXPERIMENT, "name": name_of}))
        self.dir.script.write_text("#!/bin/bash\ntrue\n")
        write_json(self.dir.submit, {"cluster": "local", "job": "999999999", "time": began})
        self._line("submit", cluster="local", job="4711")

    def _line(self, kind: str, **fields: object) -> None:
        self.dir.events.mkdir(exist_ok=True)
        line = {"time": self.clock, "event": kind, "generation": self.generation, **fields}
        append_line(self.dir.events / f"{self.generation:03d}-shell.jsonl", line)

    def attempt(self, resumed: int = 0) -> None:
        """A new attempt, which goes on from a checkpoint of this step."""
        self.generation += 1
        self.clock += 10
        self._line("start", job=None, restart=self.generation - 1)
        self.file = self.dir.tensorboard / f"events.out.tfevents.{int(self.clock)}.node.1.0.g{self.generation:03d}"
        purge = resumed + 1 if resumed else 0
        start = Event(wall_time=self.clock, step=purge, session_log=SessionLog(status=SessionLog.START))
        self._write(Event(wall_time=self.clock, file_version="brain.Event:2"), start)
        self._state("training")

    def _write(self, *events: Event) -> None:
        with self.file.open("ab") as file:
            file.write(b"".join(frame(event.SerializeToString()) for event in events))

    def steps(
        self, first: int, last: int, tags: tuple[str, ...] = ("step/loss", "IoU@0.5"), offset: float = 0.0
    ) -> None:
        """Scalars of steps first to last, one event each."""
        events = []
        for step in range(first, last + 1):
            self.clock += 1
            for number, tag in enumerate(tags):
                value = Summary.Value(tag=tag, simple_value=step + number / 4 + offset)
                events.append(Event(wall_time=self.clock, step=step, summary=Summary(value=[value])))
        self._write(*events)

    def value(self, step: int, tag: str, value: float) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._write(Event(wall_time=self.clock, step=step, summary=summary))

    def picture(self, step: int, tag: str) -> None:
        image = Summary.Image(height=1, width=1, colorspace=1, encoded_image_string=png())
        self._write(
            Event(wall_time=self.clock, step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))
        )

    def checkpoint(self, step: int) -> None:
        self.clock += 0.5
        self._line("checkpoint", step=step, name=f"g{self.generation:03d}-s{step:08d}")

    def evaluation(self, step: int, **metrics: float) -> None:
        self.evaluated = self.clock
        line = {"epoch": 1, "step": step, "split": "validation", "metrics": metrics}
        append_line(self.dir.metrics, {"generation": self.generation, "time": self.clock, **line})

    def _state(self, phase: str, **more: object) -> None:
        base = {"generation": self.generation, "job": None, "host": "elsewhere", "pid": 1, "started": self.clock}
        write_json(self.dir.state, {**base, "phase": phase, "time": self.clock, "step": 0, **more})

    def fail(self) -> None:
        self.clock += 1
        self._line("end", code=1, cause="crash")
        self._state("ended", code=1, cause="crash", reason="it failed")

    def finish(self) -> None:
        self.clock += 1
        self._line("end", code=0, cause="finished")
        self._state("ended", code=0, cause="finished", reason="finished")
        self.dir.figures.mkdir(exist_ok=True)
        self.dir.figure("confusion_matrix").write_bytes(png())
        write_json(self.dir.result, {"finished": True, "best": {"step": 1, "metrics": {}}})

    def change(self, **train: object) -> None:
        told = yaml.safe_load(self.dir.experiment.read_text())
        told["train"].update(train)
        self.dir.experiment.write_text(yaml.safe_dump(told))


def secrets_in(folder: Path, secret: str) -> list[str]:
    """The files that hold a text."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def as_json(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found

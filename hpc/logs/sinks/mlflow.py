"""MLflow as a sink, by its own client: addresses, keys, retries and limits are MLflow's.

Keys come from where MLflow has them (MLFLOW_TRACKING_TOKEN, MLFLOW_TRACKING_USERNAME and _PASSWORD,
~/.mlflow/credentials) and are never seen here.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

from hpc.errors import UserError
from hpc.logs.sinks import names
from hpc.logs.sinks.base import FAILED, FINISHED, KILLED, RUNNING, WAITING, About, Point, Remote, SinkError, SinkGone

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

Taken = ParamSpec("Taken")
Given = TypeVar("Given")

_OURS = "hpc."
_KEY, _VERSION, _SUPERSEDED, _CHANGED, _WHOLE = "hpc.run_key", "hpc.version", "hpc.superseded_by", "changed.", "name."
_STATUS = {RUNNING: "RUNNING", FINISHED: "FINISHED", FAILED: "FAILED", KILLED: "KILLED", WAITING: "SCHEDULED"}
_STATES = {status: state for state, status in _STATUS.items()}
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Else the server's pages take it for one of language models."""
_TEXT, _TAG = 6000, 8000
"""Characters of a parameter's and of a tag's value."""
_AT_ONCE = 100
"""Parameters, or tags, in one request."""
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Where the user has not said otherwise: half a minute of retries for a server that does not answer or answers 5xx."""
_LONGEST_LINE = 300


def check(address: str) -> None:
    """Raises UserError for what is no address of a server, or holds a key. The key is not repeated."""
    parts = urlsplit(address)
    if "@" in address or parts.query or parts.fragment:
        keys = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, or ~/.mlflow/credentials"
        raise UserError(
            f"mlflow:{parts.scheme}://{parts.netloc.rpartition('@')[2]}: an address holds no keys (it is seen in the "
            f"list of processes and in the shell's history); put them into {keys}"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"mlflow:{address}: no address of an MLflow server; e.g. mlflow:http://127.0.0.1:5000")


def _told(call: Callable[Taken, Given]) -> Callable[Taken, Given]:
    """MLflow's errors as one line each."""

    @wraps(call)
    def inner(*args: Taken.args, **kwargs: Taken.kwargs) -> Given:
        import requests
        from mlflow.exceptions import MlflowException

        try:
            return call(*args, **kwargs)
        except (MlflowException, requests.RequestException) as error:
            raise _sink_error(error) from error

    return inner


def _sink_error(error: Exception) -> SinkError:
    words = " ".join(str(error).split())
    silent = any(word in words for word in ("Max retries exceeded", "Connection", "timeout exception"))
    answered = "too many" in words and "error responses" in words
    if silent and not answered:
        return SinkGone("does not answer")
    return SinkError(words[:_LONGEST_LINE])


class MlflowSink:
    """A server's runs. Raises UserError where the client is not installed, else SinkError."""

    def __init__(self, address: str) -> None:
        check(address)
        self.name = f"mlflow:{address.rstrip('/')}"
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            install = f"{sys.executable} -m pip install 'mlflow-skinny<3.18'"
            raise UserError(f"{self.name}: MLflow's client is not installed here; {install}") from None
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line per retry
        self._client = MlflowClient(address.rstrip("/"))
        self._experiments: dict[str, str] = {}

    def close(self) -> None:
        pass

    @_told
    def find(self, about: About) -> Remote | None:
        """The newest version; older ones, and doubles that two senders made at once, are retired."""
        experiment = self._known_experiment(about.experiment)
        return self._newest(experiment, about.key) if experiment else None

    def _newest(self, experiment: str, key: str) -> Remote | None:
        runs = self._client.search_runs([experiment], f"tags.`{_KEY}` = '{_quoted(key)}'")
        found = sorted(runs, key=lambda run: (-_version(run), run.info.start_time, run.info.run_id))
        if not found:
            return None
        for run in found[1:]:
            self._retire(run.info.run_id, found[0].info.run_id)
        return _remote(found[0])

    def _retire(self, old: str, new: str) -> None:
        self._client.set_tag(old, _SUPERSEDED, new)
        self._client.delete_run(old)

    def _experiment(self, name: str) -> str:
        if not self._known_experiment(name):
            self._experiments[name] = self._new_experiment(name)
        return self._experiments[name]

    def _known_experiment(self, name: str) -> str | None:
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                return None
            if found.lifecycle_stage != "active":
                restore = f"mlflow experiments restore -x {found.experiment_id}"
                raise SinkError(f"experiment {name!r} is deleted on the server; '{restore}' brings it back")
            self._experiments[name] = str(found.experiment_id)
        return self._experiments[name]

    def _new_experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self._client.create_experiment(name, tags=_KIND))
        except MlflowException:
            found = self._client.get_experiment_by_name(name)  # made by somebody else in between
            if found is None:
                raise
            return str(found.experiment_id)

    @_told
    def create(self, about: About, after: Remote | None) -> Remote:
        version = after.version + 1 if after else 1
        kept = self._written_by_people(after) if after else {}
        tags = {**kept, _KEY: about.key, _VERSION: str(version), "mlflow.source.name": about.name}
        experiment = self._experiment(about.experiment)
        self._client.create_run(experiment, about.started_ms, {**tags, "mlflow.source.type": "JOB"}, about.name)
        found = self._newest(experiment, about.key)
        if found is None:
            raise SinkError(f"{about.name} was made and is not found")
        return found

    def _written_by_people(self, remote: Remote) -> dict[str, str]:
        """Tags that are neither ours nor MLflow's, and the note."""
        tags = self._client.get_run(remote.id).data.tags
        return {
            name: text
            for name, text in tags.items()
            if name == "mlflow.note.content" or not name.startswith((_OURS, "mlflow."))
        }

    @_told
    def describe(self, remote: Remote, about: About) -> None:
        """A parameter cannot change on the server: it keeps its first value, hpc.changed.NAME has the present one."""
        from mlflow.entities import Param, RunTag

        now = {names.encode(name): _short(text, _TEXT) for name, text in about.parameters.items()}
        new = [Param(name, text) for name, text in now.items() if name not in remote.parameters]
        tags = {f"{_OURS}{name}": _short(text, _TAG) for name, text in about.tags.items()}
        if commit := about.tags.get("commit"):
            tags["mlflow.source.git.commit"] = commit
        for name, text in now.items():
            mark = names.encode(f"{_OURS}{_CHANGED}{name}")
            if remote.parameters.get(name, text) != text or mark.removeprefix(_OURS) in remote.notes:
                tags[mark] = text
        known = {f"{_OURS}{name}": text for name, text in remote.notes.items()}
        known["mlflow.source.git.commit"] = remote.notes.get("commit", "")
        changed = [RunTag(name, text) for name, text in tags.items() if known.get(name) != text]
        for first in range(0, max(len(new), len(changed)), _AT_ONCE):
            some, others = new[first : first + _AT_ONCE], changed[first : first + _AT_ONCE]
            self._client.log_batch(remote.id, params=some, tags=others)

    @_told
    def points(self, remote: Remote, points: Sequence[Point], notes: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        keys = {tag: names.encode(tag) for tag in {point.tag for point in points}}
        cut = {f"{_WHOLE}{names.fingerprint(tag)}": tag for tag, key in keys.items() if names.cut(key)}
        changed = {name: text for name, text in {**cut, **notes}.items() if remote.notes.get(name) != text}
        tags = [RunTag(f"{_OURS}{name}", text[:_TAG]) for name, text in changed.items()]
        if points:
            self._client.log_batch(remote.id, metrics=[_metric(keys[point.tag], point) for point in points])
        # After the points, in a request of its own: the server keeps the parts of one separately.
        for first in range(0, len(tags), _AT_ONCE):
            self._client.log_batch(remote.id, tags=tags[first : first + _AT_ONCE])
        remote.notes.update(changed)

    @_told
    def artifacts(self, remote: Remote, folder: Path, notes: Mapping[str, str]) -> None:
        self._client.log_artifacts(remote.id, str(folder))
        self.points(remote, (), notes)

    @_told
    def state(self, remote: Remote, about: About) -> None:
        if (remote.state, remote.ended_ms if about.ended_ms else None) == (about.state, about.ended_ms):
            return
        if about.ended_ms is None:
            self._client.update_run(remote.id, _STATUS[about.state])
        else:
            self._client.set_terminated(remote.id, _STATUS[about.state], about.ended_ms)
        remote.state, remote.ended_ms = about.state, about.ended_ms

    @_told
    def has_others(self, remote: Remote, points: Iterable[Point]) -> bool:
        ours = {_as_kept(point) for point in points}
        return any(_as_kept(point) not in ours for point in self.history(remote))

    def history(self, remote: Remote) -> Iterator[Point]:
        """Every point that the server has of the run."""
        run = self._client.get_run(remote.id)
        whole = {
            name.removeprefix(f"{_OURS}{_WHOLE}"): text
            for name, text in run.data.tags.items()
            if name.startswith(f"{_OURS}{_WHOLE}")
        }
        for key in run.data.metrics:
            for one in self._client.get_metric_history(remote.id, key):
                yield Point(names.decode(key, whole), one.step, one.timestamp, one.value)


def _as_kept(point: Point) -> tuple[str, int, int, str]:
    """A point as the server gives it back, comparable: infinities become the largest numbers, NaN equals NaN."""
    value = point.value
    if math.isinf(value):
        value = math.copysign(sys.float_info.max, value)
    return point.tag, point.step, point.wall_ms, repr(value)


def _metric(key: str, point: Point) -> Metric:
    from mlflow.entities import Metric

    return Metric(key, point.value, point.wall_ms, point.step)


def _remote(run: Run) -> Remote:
    tags: dict[str, Any] = run.data.tags
    return Remote(
        id=str(run.info.run_id),
        version=_version(run),
        state=_STATES.get(run.info.status, ""),
        ended_ms=run.info.end_time,
        notes={name.removeprefix(_OURS): text for name, text in tags.items() if name.startswith(_OURS)},
        parameters=dict(run.data.params),
    )


def _version(run: Run) -> int:
    text = str(run.data.tags.get(_VERSION, "1"))
    return int(text) if text.isdecimal() else 1


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _short(text: str, longest: int) -> str:
    """With its length where it is cut: experiment.yaml, an artifact, has the whole."""
    tail = f"... ({len(text)} characters; whole in the run's files)"
    return text if len(text) <= longest else text[: longest - len(tail)] + tail

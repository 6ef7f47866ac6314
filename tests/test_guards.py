"""Decisions on losses that are not finite or far off: the same on every rank, and after any stop and resume."""

import json
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.guards import IN_A_ROW, ROLLBACKS, LossGuard, SpikeDetector, Verdict

OK, SKIP, ROLL_BACK, STOP = Verdict.OK, Verdict.SKIP, Verdict.ROLL_BACK, Verdict.STOP


def verdicts(guard: LossGuard, steps: range, bad: bool = True) -> list[Verdict]:
    return [guard.verdict(step, bad) for step in steps]


def through_json(guard: LossGuard) -> LossGuard:
    return LossGuard.from_state(json.loads(json.dumps(guard.state())))


def test_one_bad_step_is_skipped_and_forgotten() -> None:
    guard = LossGuard()
    for first in range(1, 100, 5):
        assert verdicts(guard, range(first, first + 4)) == [SKIP] * 4
        assert guard.in_streak and guard.first_bad == first
        assert guard.verdict(first + 4, bad=False) is OK
        assert not guard.in_streak
    assert guard.state() == LossGuard().state()


def test_five_in_a_row_roll_back_twice_and_then_stop() -> None:
    guard = LossGuard()
    assert verdicts(guard, range(50, 55)) == [SKIP] * 4 + [ROLL_BACK]
    assert guard.rollback_target == 44
    assert guard.roll_back(40) == list(range(45, 55)), "the bad steps, and as many good ones before them"
    assert [step for step in range(1, 99) if guard.skipped(step)] == list(range(45, 55))
    assert verdicts(guard, range(41, 45), bad=False) == [OK] * 4
    assert verdicts(guard, range(70, 75)) == [SKIP] * 4 + [ROLL_BACK]
    assert guard.roll_back(guard.rollback_target) == list(range(60, 75)), "twice as many good ones"
    assert verdicts(guard, range(90, 95)) == [SKIP] * 4 + [STOP]


def test_good_steps_are_counted_past_those_that_were_passed_over() -> None:
    guard = LossGuard()
    verdicts(guard, range(50, 55))
    guard.roll_back(40)
    verdicts(guard, range(57, 62))
    assert guard.rollback_target == 36
    assert guard.roll_back(36) == [*range(37, 45), 55, 56, *range(57, 62)]


def test_a_rollback_passes_over_nothing_that_its_checkpoint_contains() -> None:
    guard = LossGuard()
    verdicts(guard, range(50, 55))
    assert guard.roll_back(47) == list(range(48, 55))
    early = LossGuard()
    verdicts(early, range(3, 8))
    assert early.rollback_target == 0
    assert early.roll_back(0) == list(range(1, 8))


def test_a_step_that_is_passed_over_ends_a_row() -> None:
    guard = LossGuard()
    verdicts(guard, range(50, 55))
    guard.roll_back(40)
    assert verdicts(guard, range(41, 45)) + verdicts(guard, range(55, 60)) == [SKIP] * 8 + [ROLL_BACK]


def test_there_is_nothing_to_go_back_from_without_a_bad_step() -> None:
    with pytest.raises(ValueError, match="no bad step"):
        LossGuard().roll_back(3)


def test_the_reason_names_steps_samples_and_what_to_try() -> None:
    guard = LossGuard()
    for first in (50, 70, 90):
        verdicts(guard, range(first, first + 5))
        if first < 90:
            guard.roll_back(guard.rollback_target)
    line = guard.reason([f"scan{n}" for n in range(25)])
    assert line.startswith(
        "the loss or the gradient was not finite at steps 90-94, after 2 rollbacks that passed over "
    )
    assert "steps 45-54 and 60-74" in line and "scan0, scan1" in line and "and 5 more" in line and "\n" not in line
    assert all(key in line for key in ("train.optimizer.lr", "train.clip_norm", "train.precision=fp32"))
    one = LossGuard()
    one.verdict(7, bad=True)
    assert one.reason().startswith("the loss or the gradient was not finite at step 7: lower")


# A run that is stopped anywhere decides as the undisturbed one.

TOTAL = 70


@dataclass
class Model:
    """Stands for the weights: the steps that made them. `blowups` are (culprit, first, last bad step)."""

    blowups: list[tuple[int, int, int]]
    applied: list[int] = field(default_factory=list)

    def bad(self, step: int) -> bool:
        return any(culprit in (0, *self.applied) and low <= step <= high for culprit, low, high in self.blowups)


def play(blowups: list[tuple[int, int, int]], saves: set[int], kills: set[int]) -> tuple[str, list[int], dict]:
    """A run as LossGuard's docstring asks for it: its end, the steps that made its weights, and the guard's state.

    `saves` are steps with a checkpoint, `kills` count the steps done by all attempts, after which one dies.
    """
    stored = {0: ([], LossGuard().state())}
    step, done, model, guard = 0, 0, Model(blowups), LossGuard()
    while step < TOTAL:
        step, done = step + 1, done + 1
        verdict = None if guard.skipped(step) else guard.verdict(step, model.bad(step))
        if verdict is OK:
            model.applied.append(step)
        elif verdict is STOP:
            return guard.reason(), model.applied, guard.state()
        elif verdict is ROLL_BACK:
            step = max(at for at in stored if at <= guard.rollback_target)
            guard.roll_back(step)
            model.applied = list(stored[step][0])
            stored = {at: kept for at, kept in stored.items() if at <= step}
        elif step in saves:
            stored[step] = (list(model.applied), json.loads(json.dumps(guard.state())))
        if done in kills:
            step = max(stored)
            model.applied, guard = list(stored[step][0]), LossGuard.from_state(stored[step][1])
    return "done", model.applied, guard.state()


BLOWUPS = st.lists(
    st.tuples(st.integers(0, TOTAL), st.integers(1, TOTAL), st.integers(0, 12)).map(
        lambda b: (b[0], b[1], b[1] + b[2])
    ),
    max_size=5,
)
MOMENTS = st.sets(st.integers(1, 2 * TOTAL), max_size=12)


@settings(max_examples=150, deadline=None)
@given(BLOWUPS, MOMENTS, MOMENTS)
def test_saves_and_kills_change_no_decision(
    blowups: list[tuple[int, int, int]], saves: set[int], kills: set[int]
) -> None:
    undisturbed = play(blowups, set(), set())
    assert play(blowups, saves, kills) == undisturbed
    assert undisturbed[2]["rollbacks"] <= ROLLBACKS


def test_the_play_has_rollbacks_in_it() -> None:
    """Or the property above would prove nothing."""
    end, applied, state = play([(17, 20, 26)], {10, 18, 22}, {12, 24, 30})
    assert end == "done" and state["rollbacks"] == 1 and 17 not in applied and len(applied) == TOTAL - 2 * IN_A_ROW
    assert play([(0, 20, 60)], set(), set())[0].startswith("the loss or the gradient was not finite")


# Spikes.


def curve(kind: str, seed: int, length: int = 3000) -> np.ndarray:
    rng, t = np.random.default_rng(seed), np.arange(length)
    falling = 0.1 + 2.2 * np.exp(-t / 400)
    return {
        "constant": np.full(length, 0.7),
        "smooth": falling,
        "falls to nothing": np.exp(-t / 40.0),
        "rises slowly": 0.5 + 1e-4 * t,
        "warms up": 2.3 + 0.2 * np.sin(t / 30),
        "noisy": falling * (1 + 0.2 * rng.standard_normal(length)),
        "negative": -3 - falling + 0.1 * rng.standard_normal(length),
        "small batches": falling * rng.gamma(4, 0.25, length),
        "rounded": np.round(0.3 + 0.01 * rng.standard_normal(length), 2),
    }[kind]


KINDS = ["constant", "smooth", "falls to nothing", "rises slowly", "warms up", "noisy", "negative", "small batches"]


@pytest.mark.parametrize("kind", [*KINDS, "rounded"])
def test_no_false_alarm_and_a_spike_within_its_step(kind: str) -> None:
    for seed in range(3):
        losses, detector = curve(kind, seed), SpikeDetector()
        alarms = [step for step, loss in enumerate(losses, 1) if detector.seen(step, float(loss))]
        assert not alarms, (seed, alarms)
        assert detector.seen(len(losses) + 1, 1000 * abs(float(losses[-1])) + 1e-6)
        assert not detector.seen(len(losses) + 2, float(losses[-1])), "the spike is not in the window"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-6, 1e6), st.floats(0, 0.3))
def test_no_false_alarm_at_any_scale(seed: int, scale: float, noise: float) -> None:
    losses = scale * (1 + noise * np.random.default_rng(seed).uniform(-1, 1, 300))
    detector = SpikeDetector()
    assert not any(detector.seen(step, float(loss)) for step, loss in enumerate(losses))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 150), st.lists(st.integers(33, 199), max_size=4))
def test_a_resumed_detector_decides_as_the_undisturbed_one(seed: int, stop: int, spikes: list[int]) -> None:
    losses = [float(loss) for loss in np.random.default_rng(seed).gamma(4, 0.25, 200)]
    for at in spikes:
        losses[at] *= 1000
    one, other = SpikeDetector(), SpikeDetector()
    expected = [one.seen(step, loss) for step, loss in enumerate(losses)]
    before = [other.seen(step, losses[step]) for step in range(stop)]
    other = SpikeDetector.from_state(json.loads(json.dumps(other.state())))
    assert before + [other.seen(step, losses[step]) for step in range(stop, 200)] == expected
    assert other.state() == one.state()


def test_steps_done_again_take_back_what_followed_them() -> None:
    detector = SpikeDetector()
    first = [detector.seen(step, 1 + step % 3) for step in range(100)]
    again = [detector.seen(step, 1 + step % 3) for step in range(60, 100)]
    assert not any(first + again)
    assert [step for step, _ in detector.state()["losses"]] == list(range(100))


def test_a_new_level_is_learnt() -> None:
    detector = SpikeDetector()
    told = [detector.seen(step, 1.0 if step < 100 else 50.0 + step % 2) for step in range(300)]
    assert told == [False] * 100 + [True] * SpikeDetector.LEAST + [False] * (200 - SpikeDetector.LEAST)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_no_spikes(loss: float) -> None:
    detector = SpikeDetector()
    for step in range(50):
        detector.seen(step, 1.0)
    before = detector.state()
    assert not detector.seen(50, loss)
    assert detector.state() == before


def test_nothing_is_told_before_there_is_something_to_compare_with() -> None:
    detector = SpikeDetector()
    losses = [1.0, 900.0, 2.0] * 10
    assert not any(detector.seen(step, loss) for step, loss in enumerate(losses))
    with pytest.raises(ValueError, match="too short"):
        SpikeDetector(window=10)

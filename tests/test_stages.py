"""Which stage a step belongs to, at and beside each border."""

from hpc.training import Train
from jobs.stages import Stages


def test_a_step_belongs_to_one_stage() -> None:
    stages = Stages(Train.model_validate({"stages": [{"epochs": 2}, {"epochs": 1}, {"epochs": 3}]}), 4)
    assert [stages.at(step) for step in range(26)] == [0] * 8 + [1] * 4 + [2] * 14
    assert stages.total_steps == 24
    assert [stages.first_step(number) for number in range(3)] == [0, 8, 12]
    assert [stages.steps(number) for number in range(3)] == [8, 4, 12]
    assert stages.where(1) == "train.stages.1"


def test_a_run_without_stages_is_one() -> None:
    stages = Stages(Train(epochs=3), 4)
    assert (len(stages), stages.total_steps, stages.steps(0)) == (1, 12, 12)
    assert {stages.at(step) for step in range(13)} == {0}
    assert stages[0].lr is None and stages.where(0) == "train"

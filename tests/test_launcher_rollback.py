"""A submission of functions that is refused or interrupted half-way leaves no job and no file."""

from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import FailedSubmissionError

from hpc import slurm
from hpc.launch import Launcher
from tests.fakeslurm import FakeSlurm


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Not there yet."""
    return tmp_path / "logs"


def test_a_refused_chunk_takes_the_others_back(logs: Path, fake: FakeSlurm) -> None:
    fake.configure({"MaxArraySize": "4"})
    sbatch = fake.folder / "bin" / "sbatch"
    sbatch.write_text(
        sbatch.read_text().replace("script=", '[ ! -e jobs/102 ] || { echo "no more" >&2; exit 1; }\nscript=')
    )
    with pytest.raises(FailedSubmissionError, match="no more"):
        Launcher(logs).map_array(abs, range(10))
    assert fake.jobs() == {"101": "CANCELLED", "102": "CANCELLED"} and not logs.exists()
    submitted = [call for call in fake.calls() if call.startswith("sbatch --parsable")]
    assert len(submitted) == 3 and all(" --hold " in call for call in submitted)


def test_ctrl_c_in_the_middle_of_sbatch_leaves_no_job(
    logs: Path, fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = slurm.submit

    def interrupted(*arguments: Any) -> str:
        submit(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Launcher(logs).submit(abs, -3)
    assert fake.jobs() == {"101": "CANCELLED"} and not logs.exists()

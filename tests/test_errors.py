"""The words of a user's mistake: the nearest names first, and a list that a terminal can hold."""

from hpc.errors import nearest


def test_a_short_list_is_whole_and_of_a_thousand_runs_a_few_are_named() -> None:
    keys = [f"key{number:02d}" for number in range(30)]
    assert nearest("key7", keys).endswith(f"valid: {', '.join(keys)}")
    told = nearest("exp-0000aaaq", [*(f"run-{number:04d}" for number in range(999)), "exp-0000aaaa"])
    assert told.startswith("did you mean 'exp-0000aaaa'? valid: run-0000, run-0001,")
    assert told.endswith("run-0011, ... and 987 more")

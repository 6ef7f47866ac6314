"""Names of metrics for MLflow: what its own rules refuse is written otherwise, and comes back as it was."""

import pytest
from hypothesis import given, strategies
from mlflow.utils import validation

from hpc.logs.sinks.names import LONGEST, cut, decode, encode, fingerprint

NAMES = strategies.one_of(strategies.text(max_size=300), strategies.text("a_xH4/.@0 ", max_size=12))


@given(NAMES)
def test_any_name_is_taken_and_comes_back(name: str) -> None:
    told = encode(name)
    validation._validate_metric_name(told)
    assert len(told) <= LONGEST
    assert decode(told, {fingerprint(name): name} if cut(told) else {}) == name


@given(NAMES, NAMES)
def test_two_names_stay_two(one: str, other: str) -> None:
    assert (encode(one) == encode(other)) == (one == other)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("..0", "_x2E_.0"),
        ("validation/accuracy", "validation/accuracy"),
        ("step/loss_xent", "step/loss_xent"),
        ("IoU@0.5", "IoU_x40_0.5"),
        ("f1[0]", "f1_x5B_0_x5D_"),
        ("f1 (macro)", "f1 _x28_macro_x29_"),
        ("a_x41_", "a_x5F_x41_"),
        ("/a//b/", "_x2F_a_x2F_/b_x2F_"),
        ("..", "_x2E__x2E_"),
        ("", "_xH_"),
    ],
)
def test_usual_names_stay_readable(name: str, told: str) -> None:
    assert encode(name) == told

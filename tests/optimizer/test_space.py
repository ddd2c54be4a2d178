"""Parameters and their distributions."""

import pytest

from optimizer.space import Categorical, Number, check_parameters, defaults

SPACE = {
    "method": Categorical(("minmax", "percentile")),
    "percentile": Number(99.0, 100.0, 99.9, when={"method": ("percentile",)}),
    "samples": Number(1, 512, 128, whole=True, logarithmic=True),
}


def test_defaults_leave_out_what_does_not_exist() -> None:
    assert defaults(SPACE) == {"method": "minmax", "samples": 128}


def test_defaults_follow_a_given_choice() -> None:
    assert defaults(SPACE, method="percentile") == {
        "method": "percentile",
        "percentile": 99.9,
        "samples": 128,
    }


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        pytest.param({"method": "minmax"}, "want .*samples", id="one is missing"),
        pytest.param({"method": "minmax", "samples": 1, "seed": 0}, "got .*seed", id="unknown"),
        pytest.param(
            {"method": "minmax", "samples": 1, "percentile": 99.9}, "got", id="doesn't exist"
        ),
        pytest.param({"method": "mse", "samples": 1}, "method: got 'mse'", id="not a choice"),
        pytest.param({"method": "minmax", "samples": 0}, "samples: got 0", id="below the range"),
        pytest.param({"method": "minmax", "samples": 1.5}, "samples: got 1.5", id="not whole"),
        pytest.param({"method": "minmax", "samples": True}, "samples: got True", id="a boolean"),
    ],
)
def test_parameters_are_refused_when_outside_of_the_space(
    parameters: dict[str, str | int | float | bool], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        check_parameters(SPACE, parameters)


def test_categorical_tells_true_from_one() -> None:
    assert Categorical((True, False)).allows(True)
    assert not Categorical((True, False)).allows(1)


def test_categorical_refuses_repeated_choices() -> None:
    with pytest.raises(ValueError, match="each once"):
        Categorical(("a", "a"))

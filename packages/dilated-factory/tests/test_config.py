"""Configurations of models and training: strict about what they take."""

import re

import pytest
from pydantic import ValidationError

from dilated_factory import InputError, LongNetConfig, TrainConfig
from dilated_factory.configs.models import parse_config


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"embed_dim": 0}, ["embed_dim", "greater than or equal to 1", "0"]),
        ({"embed_dim": 20, "num_heads": 3}, ["embed_dim", "num_heads=3"]),
        ({"segment_lengths": (8, 16)}, ["segment_lengths", "dilation_rates"]),
        ({"segment_lengths": (8,), "dilation_rates": (0,)}, ["dilation_rates", "0"]),
        ({"context": 10, "segment_lengths": (11,), "dilation_rates": (1,)}, ["context=10", "11"]),
        (
            {"num_heads": 2, "head_groups": "split", "context": 8192},
            ["number of branches (4)", "split", "2"],
        ),
        ({"positions": "nowhere"}, ["positions", "rotary", "nowhere"]),
        ({"positions": "xpos", "context": 60000}, ["xpos_scale_base", "512", "60000"]),
        ({"dropout": 1.0}, ["dropout", "less than 1", "1.0"]),
        ({"width": 3}, ["width", "not permitted", "3"]),
    ],
)
def test_an_invalid_model_is_an_error_of_one_line(
    values: dict[str, object], says: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(LongNetConfig, values)
    assert "\n" not in str(caught.value)
    for part in says:
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(says[0].split("=")[0])):
        LongNetConfig.model_validate(values)


@pytest.mark.parametrize("duration", [{}, {"steps": 3, "minutes": 1.0}])
def test_a_run_has_exactly_one_duration(duration: dict[str, float]) -> None:
    with pytest.raises(InputError, match="exactly one of steps and minutes"):
        parse_config(TrainConfig, duration)


def test_a_configuration_cannot_be_changed() -> None:
    config = LongNetConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.embed_dim = 4  # type: ignore[misc]

"""Types that the sections share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: Any) -> Any:
    """YAML reads `no` and `on` as truth values, which pydantic would take for 0 and 1."""
    if isinstance(value, bool):
        raise ValueError(f"a number is wanted, got the truth value {value} (YAML reads yes, no, on and off as such)")
    return value


Integer = Annotated[int, BeforeValidator(_no_truth_value)]
Count = Annotated[Integer, Field(ge=0)]
Positive = Annotated[Integer, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_no_truth_value)]
NonNegative = Annotated[Number, Field(ge=0.0)]
PositiveFloat = Annotated[Number, Field(gt=0.0)]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
PositiveFraction = Annotated[Number, Field(gt=0.0, le=1.0)]
ShareBelowOne = Annotated[Number, Field(ge=0.0, lt=1.0)]
Range = tuple[Number, Number]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

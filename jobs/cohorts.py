"""Cohorts as the command line takes them."""

from __future__ import annotations

from lum_ray.artifacts import UserError


def shares(text: str) -> dict[str, float]:
    """`a:0.5,b:0.5` as a table. Raises UserError for another form."""
    result = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition(":")
        try:
            result[name.strip()] = float(value)
        except ValueError:
            raise UserError(
                f"--cohorts {text}: expected shares such as treatment:0.5,control:0.5, got {part!r}"
            ) from None
    return result

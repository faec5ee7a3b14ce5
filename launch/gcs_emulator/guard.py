"""Who may use a bucket: nobody is authenticated, but tokens can be asked for, as a test of a client's needs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launch.gcs_emulator.bucket import ApiError

_ANONYMOUS = "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."


@dataclass(frozen=True)
class Guard:
    """tokens: what a bearer token begins with that is accepted, '' for every caller. payer: the project that every
    request has to name, as for a bucket whose requester pays."""

    tokens: tuple[str, ...] = ("",)
    payer: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Guard:
        """From JSON. Raises ValueError, TypeError."""
        return cls(**{**values, "tokens": tuple(values.get("tokens", cls.tokens))})

    def check(self, query: Mapping[str, str], headers: Mapping[str, str]) -> None:
        """Raises ApiError, with the service's own words."""
        named = {name.lower(): value for name, value in headers.items()}
        token = named.get("authorization", "").removeprefix("Bearer ")
        if "" not in self.tokens and not token:
            raise ApiError(401, _ANONYMOUS, "required")
        if not token.startswith(self.tokens):
            raise ApiError(401, "Invalid Credentials", "authError")
        if self.payer and self.payer not in (query.get("userProject"), named.get("x-goog-user-project")):
            raise ApiError(400, "Bucket is a requester pays bucket but no user project provided.", "required")

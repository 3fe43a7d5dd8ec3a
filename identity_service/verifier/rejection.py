"""Why a token is refused, in words that stay the same."""

from typing import Literal

Reason = Literal[
    "malformed",
    "wrong_type",
    "wrong_algorithm",
    "unknown_key",
    "bad_signature",
    "wrong_issuer",
    "wrong_audience",
    "expired",
    "not_yet_valid",
    "missing_claim",
    "revoked",
    "keys_unavailable",
]


class TokenRejected(Exception):
    """A token cannot be accepted. It says nothing about the caller's intent: clocks run and keys rotate.

    Attributes:
        reason: stable; what programs should look at. `keys_unavailable` is the only one that is not the token's fault.
        detail: for the log; never holds any part of the token but names of claims.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason: Reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else reason)

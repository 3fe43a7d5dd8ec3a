"""How scopes are written (RFC 6749 3.3), and the prefix that is reserved for this service's own.

Who has which is decided in `accounts.roles` for users and in `clients` for what services do by themselves.
"""

import re

from identity_service.errors import ScopeRejected

RESERVED = "identity:"
"""How this service's own scopes begin. A login gets one only when it asks for it by name."""

_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5B\x5D-\x7E]{1,128}", re.ASCII)
_MOST_SCOPES = 64


def parse(unverified_scope: str) -> tuple[str, ...]:
    """Return the requested scopes in the order given, each once.

    Raises:
        ScopeRejected: a character that a scope cannot have, or more scopes than anyone needs.
    """
    requested = tuple(dict.fromkeys(unverified_scope.split(" "))) if unverified_scope else ()
    if len(requested) > _MOST_SCOPES or not all(_SCOPE_TOKEN.fullmatch(scope) for scope in requested):
        raise ScopeRejected
    return requested


def parse_given(scope: str) -> tuple[str, ...]:
    """Return the scopes that an administrator gives to a role or to a client.

    Raises:
        ScopeRejected: as `parse`, or one of this service's own; the text says what is wrong.
    """
    try:
        given = parse(scope)
    except ScopeRejected:
        raise ScopeRejected(
            f"There may be at most {_MOST_SCOPES} scopes of printable ASCII, separated by single spaces."
        ) from None
    if any("," in name for name in given):
        raise ScopeRejected("Scopes are separated by spaces, not by commas.")
    if any(name.startswith(RESERVED) for name in given):
        raise ScopeRejected(f"Scopes that begin with {RESERVED} belong to this service; the role admin gives them.")
    return given

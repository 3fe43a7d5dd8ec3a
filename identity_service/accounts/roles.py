"""Roles and the scopes they give."""

import re
from collections.abc import Sequence

from identity_service.errors import ScopeRejected

ADMIN = "admin"
SCOPES: dict[str, tuple[str, ...]] = {ADMIN: ("identity:admin",)}
ROLE_NAME = re.compile(r"[a-z][a-z0-9_.:-]{0,63}", re.ASCII)

# scope-token of RFC 6749 3.3.
_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5B\x5D-\x7E]{1,128}", re.ASCII)
_MOST_SCOPES = 64


def parse_scope(unverified_scope: str) -> tuple[str, ...]:
    """Return the requested scopes in the order given, each once (RFC 6749 3.3).

    Raises:
        ScopeRejected: a character that a scope cannot have, or more scopes than anyone needs.
    """
    requested = tuple(dict.fromkeys(unverified_scope.split(" "))) if unverified_scope else ()
    if len(requested) > _MOST_SCOPES or not all(_SCOPE_TOKEN.fullmatch(scope) for scope in requested):
        raise ScopeRejected
    return requested


def granted(requested: Sequence[str], roles: Sequence[str]) -> tuple[str, ...]:
    """Return the requested scopes that the roles give. `identity:*` is only ever given when asked for by name."""
    given = {scope for role in roles for scope in SCOPES.get(role, ())}
    return tuple(scope for scope in requested if scope in given)

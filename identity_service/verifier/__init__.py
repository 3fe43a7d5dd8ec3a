"""Verifying this service's access tokens in another process: no call per request, and a logout still arrives.

    verifier = Verifier("https://id.example.com", audience="orders")
    claims = await verifier.verify(unverified_token)

`jws` reads the envelope, `claims` the contents, `keys` holds the issuer's public keys, `revocations` follows what the
issuer has revoked (`events` its stream, `status_list` its lists), `cache` remembers what has been verified,
`verification` puts them in order. `http` asks the issuer, at `addresses` that may be trusted; `rejection` is what a bad
token ends in. `fastapi` is the dependency for FastAPI applications, `testing` an issuer in memory for their tests.
Nothing else of identity_service is imported from here: `pip install identity-service` without extras is all that this
package needs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from identity_service.verifier.claims import Claims
    from identity_service.verifier.rejection import TokenRejected
    from identity_service.verifier.verification import Verifier, VerifierStatus

__all__ = ["Claims", "TokenRejected", "Verifier", "VerifierStatus"]

_MODULES = {
    "Claims": "claims",
    "TokenRejected": "rejection",
    "Verifier": "verification",
    "VerifierStatus": "verification",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import on first use (PEP 562): the service itself needs `jws` and `claims`, but no HTTP client."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

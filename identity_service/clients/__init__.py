"""OAuth clients: the programs that ask for tokens, and how they prove who they are.

`registration` makes and changes them, `authentication` proves who asks, `own_tokens` is what they get for themselves
(client credentials). One client is built in and public: the frontends of this installation. Sessions that a client
begins for users are the business of `sessions`.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from identity_service.sessions import BUILT_IN_CLIENT


@dataclass(frozen=True, slots=True)
class Client:
    """A program that asks for tokens. It never carries the digest of its secret.

    Attributes:
        grants: the grant types it may use.
        scopes: what it may do by itself. What a user may do through it is given by the user's roles.
        audience: who its tokens are for; empty for those of the installation.
        first_party: whether it may handle passwords, and its users' tokens open this service's own API.
        public: without a secret; only the built-in one is.
        access_lifetime: of its access tokens; None for the installation's.
        previous_secret_expires_at: until when the secret before the last rotation is accepted beside the present one.
    """

    client_id: str
    grants: tuple[str, ...]
    scopes: tuple[str, ...]
    audience: tuple[str, ...]
    first_party: bool
    public: bool
    access_lifetime: timedelta | None
    created_at: datetime | None
    secret_changed_at: datetime | None
    previous_secret_expires_at: datetime | None
    disabled_at: datetime | None


@dataclass(frozen=True, slots=True)
class ClientCredentials:
    """What a client that presents a secret is checked against."""

    client: Client
    secret_digest: bytes
    previous_secret_digest: bytes | None


FIRST_PARTY = Client(
    BUILT_IN_CLIENT,
    grants=("password", "refresh_token"),
    scopes=(),
    audience=(),
    first_party=True,
    public=True,
    access_lifetime=None,
    created_at=None,
    secret_changed_at=None,
    previous_secret_expires_at=None,
    disabled_at=None,
)

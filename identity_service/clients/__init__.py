"""OAuth clients: who asks for tokens, and how they prove it.

For now there is one, built in and public: the frontends of this installation.
"""

from dataclasses import dataclass

from identity_service.errors import ClientRejected


@dataclass(frozen=True, slots=True)
class Client:
    """A program that asks for tokens. A public client has no secret; a first-party one may handle passwords."""

    client_id: str
    public: bool
    first_party: bool


FIRST_PARTY = Client("first-party", public=True, first_party=True)


def identify(client_id: str, *, presented_secret: str) -> Client:
    """Return the client that asks; an empty id means the first-party client.

    Raises:
        ClientRejected: unknown client, or a secret that it does not have.
    """
    if client_id not in ("", FIRST_PARTY.client_id):
        raise ClientRejected(detail="unknown client")
    if presented_secret:
        raise ClientRejected(detail="a public client has no secret")
    return FIRST_PARTY

"""Who is really asking: the address of the client behind the proxies that we trust, and behind no others.

Only `X-Forwarded-For` is read, and only as far as trusted proxies have written it.
"""

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TypeAlias

from starlette.types import Scope

_MOST_PROXIES = 16
_LONGEST_ENTRY = 64

Known: TypeAlias = tuple[str | None, bool]
"""An address in its one spelling, and whether it is a proxy of ours."""


class TrustedProxies:
    """The proxies in front of this service.

    Args:
        networks: where they are. Nobody else is believed.
    """

    def __init__(self, networks: Sequence[IPv4Network | IPv6Network]) -> None:
        self._networks = tuple(networks)
        # Each request asks, and most come from few addresses.
        self._look_up = lru_cache(maxsize=1024)(self._parse)

    def client_of(self, scope: Scope) -> str | None:
        """Return the address of whoever asks, None when there is none (a Unix socket).

        From the peer on it goes from proxy to proxy, right to left, to the first that is not ours. What cannot be read
        ends the way as well: everything to its left was there when it came to us.
        """
        client = scope.get("client")
        address, trusted = self._look_up(client[0]) if client else (None, False)
        if not trusted:
            return address
        given = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        for entry in reversed(b",".join(given).rsplit(b",", _MOST_PROXIES)[-_MOST_PROXIES:]):
            text = _without_port(entry.decode("latin-1").strip(" \t"))
            hop, trusted = self._look_up(text) if len(text) <= _LONGEST_ENTRY else (None, False)
            if hop is None:
                break
            address = hop
            if not trusted:
                break
        return address

    def _parse(self, text: str) -> Known:
        try:
            address = ip_address(text.partition("%")[0])
        except ValueError:
            return None, False
        if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return str(address), any(address in network for network in self._networks)


def _without_port(entry: str) -> str:
    """Return the address of `192.0.2.7:1234`, `[2001:db8::1]:1234` or one without a port."""
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    return entry.partition(":")[0] if entry.count(":") == 1 else entry

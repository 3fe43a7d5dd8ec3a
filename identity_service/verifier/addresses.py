"""Which addresses may be trusted with keys and tokens: https, or http on this machine."""

from ipaddress import ip_address
from urllib.parse import urlsplit


def check_url(url: str | None) -> None:
    """Refuse an address that tokens or keys must not depend on.

    Args:
        url: None is a variable of the environment that is not set.

    Raises:
        ValueError: not https (or http to this machine), or not a plain address.
    """
    parts = urlsplit(url or "")
    plain = parts.hostname and not (parts.username or parts.query or parts.fragment) and (url or "").isascii()
    if url is None or not plain or any(character <= " " or character in '\\"<>' for character in url):
        raise ValueError(f"not an address of an issuer, such as https://id.example.com: {url!r}")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback_url(url)):
        raise ValueError(f"only https, or http to this machine, can be trusted: {url!r}")


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def is_loopback_url(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")

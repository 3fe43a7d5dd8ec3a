"""Asking a service outside whether a new password is known from a breach, without telling it which password that is.

Only the first five hexadecimal digits of its SHA-1 leave (k-anonymity: hundreds of known passwords share them), and
only when a password is set, never when one is proved. No answer in time means that nothing is known against it: signing
up must not depend on somebody else's service. The policy that needs no network is next door in `passwords`.
"""

import asyncio
import hashlib
import logging
import re
import ssl

from identity_service.errors import PasswordRejected
from identity_service.verifier.addresses import is_loopback_url

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 1.0
"""For everything, from the name's resolution to the last byte."""

MAX_LENGTH = 512 * 1024
MOST_AT_ONCE = 16
_PREFIX_LENGTH = 5
_LINE = re.compile(rb"^([0-9A-F]{35}):([0-9]+)\r?$", re.IGNORECASE | re.MULTILINE)


class BreachCheck:
    """Asks a range API such as that of Have I Been Pwned: `GET <url>/<prefix>` answers lines of `SUFFIX:COUNT`.

    Args:
        url: checked by the settings: https, or http on this machine.
    """

    def __init__(self, url: str) -> None:
        # A tenth of the time that a start takes: for those alone who want the check, and then before the first request.
        import httpx2

        self._open = httpx2.AsyncClient
        self._read_certificates = httpx2.create_ssl_context
        self._failures = (httpx2.HTTPError, httpx2.InvalidURL, OSError, TimeoutError, _Unusable)
        self._url = url.rstrip("/")
        self._local = is_loopback_url(url)
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        self._tls: ssl.SSLContext | None = None

    async def refuse_breached(self, password: str) -> None:
        """Refuse a normalised password that is known from a breach.

        Raises:
            PasswordRejected: it is; the reason is `breached`.
        """
        digest = hashlib.sha1(password.encode(), usedforsecurity=False).hexdigest().upper()
        prefix, suffix = digest[:_PREFIX_LENGTH], digest[_PREFIX_LENGTH:].encode()
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS), self._places:
                known = await self._ask(prefix)
        except self._failures as error:
            # Neither the address nor the error's own text: the prefix is in them.
            detail = str(error) if isinstance(error, _Unusable) else type(error).__name__
            log.info("passwords.breach_check_failed", extra={"detail": detail})
            return
        if suffix in known:
            raise PasswordRejected("breached", "The password is known from a breach of another service.")

    async def _ask(self, prefix: str) -> set[bytes]:
        """Return the suffixes of known passwords. Those with a count of zero are padding."""
        if self._tls is None:
            # Reading the certificate store takes tens of milliseconds.
            self._tls = await asyncio.to_thread(self._read_certificates)
        headers = {"Add-Padding": "true", "Accept-Encoding": "identity", "User-Agent": "identity-service"}
        async with (
            self._open(verify=self._tls, trust_env=not self._local, timeout=TIMEOUT_SECONDS) as client,
            client.stream("GET", f"{self._url}/{prefix}", headers=headers, follow_redirects=False) as answer,
        ):
            if answer.status_code != 200:
                raise _Unusable(f"answered {answer.status_code}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise _Unusable("answered in a coding that was not asked for")
            body = bytearray()
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MAX_LENGTH:
                    raise _Unusable("answered too much")
        lines = _LINE.findall(bytes(body))
        if not lines:
            raise _Unusable("answered something else")
        return {suffix.upper() for suffix, count in lines if count.strip(b"0")}


class _Unusable(Exception):
    """An answer that says nothing; the text is for the log."""

"""The settings of one installation: frozen, typed, and read from the environment here and nowhere else.

Every variable is `IDENTITY_` plus the field's name in capitals. Any of them can be read from a file instead, by naming
the file in the same variable with `_FILE` behind it. `DATABASE_URL` is accepted without the prefix.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from identity_service.errors import ConfigurationError
from identity_service.verifier.addresses import check_url, is_loopback_url
from identity_service.verifier.claims import MAXIMUM_LIFETIME

PREFIX = "IDENTITY_"
UNPREFIXED = {"database_url": "DATABASE_URL"}


def _seconds(value: object) -> object:
    if isinstance(value, str):
        try:
            return timedelta(seconds=float(value))
        except (ValueError, OverflowError):
            raise ValueError("must be a number of seconds") from None
    return value


def _words(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
        if not isinstance(value, list) or not all(isinstance(word, str) and word.split() == [word] for word in value):
            raise ValueError("must be words separated by spaces or commas, or a JSON array of strings")
        return tuple(value)
    return tuple(value.replace(",", " ").split())


def _in_any_case(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _between(least: int, most: timedelta) -> AfterValidator:
    """Return a validator in words of seconds, which is what was given."""

    def check(value: timedelta) -> timedelta:
        if not timedelta(seconds=least) <= value <= most:
            raise ValueError(f"must be a number of seconds from {least} to {most.total_seconds():.0f}")
        return value

    return AfterValidator(check)


Window = Annotated[timedelta, BeforeValidator(_seconds), _between(0, timedelta(days=365))]
# Times in a token are whole seconds: one that lives for less would have expired when it is issued.
Lifetime = Annotated[timedelta, BeforeValidator(_seconds), _between(1, timedelta(days=3650))]
AccessLifetime = Annotated[timedelta, BeforeValidator(_seconds), _between(1, timedelta(seconds=MAXIMUM_LIFETIME))]
Retention = Annotated[timedelta, BeforeValidator(_seconds), _between(0, timedelta(days=36500))]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Switch = Annotated[Literal["on", "off"], BeforeValidator(_in_any_case)]


def _networks(value: object) -> object:
    words = _words(value)
    return tuple(_network(word) for word in words) if isinstance(words, tuple) else words


def _network(word: object) -> IPv4Network | IPv6Network:
    try:
        network = ip_network(word)  # type: ignore[arg-type]  # whatever it cannot read is refused below
    except ValueError:
        raise ValueError("must list addresses or networks such as 192.0.2.7, 10.0.0.0/8 or fd00::/8") from None
    if isinstance(network, IPv6Network) and (mapped := network.network_address.ipv4_mapped) is not None:
        # Addresses are compared in their own family.
        network = ip_network((int(mapped), max(0, network.prefixlen - 96)), strict=False)
    return network


Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_networks)]


_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*", re.ASCII)
_POSTGRES = re.compile(r"postgres(ql)?(\+[a-z0-9]+)?://([^@/#?\s]*@)?[^@/#?\s]*(/[^@/#?\s]*)?(\?[^#\s]*)?", re.ASCII)


class Settings(BaseModel):
    """One installation's settings. Durations are given in seconds and held as timedeltas."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    database_url: SecretStr | None = None
    database_pool_size: Annotated[int, Field(ge=1, le=500)] = 20
    embedded_dir: Path = Path(".local/postgres")
    migrate_on_start: Annotated[Literal["auto", "on", "off"], BeforeValidator(_in_any_case)] = "auto"

    bind: str = "127.0.0.1:8000"
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    metrics_bind: str = ""
    issuer_url: str = ""
    allowed_origins: Words = ()
    allowed_hosts: Words = ()
    trusted_proxies: Networks = ()
    throttle_exempt: Networks = ()
    drain: Window = timedelta(0)
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_in_any_case)] = "info"

    keys_dir: Path = Path("keys")
    keys_passphrase: SecretStr | None = None
    key_publish_window: Window = timedelta(seconds=900)
    key_rotation_period: Window = timedelta(days=90)

    audience: Words = ("api",)
    access_lifetime: AccessLifetime = timedelta(seconds=600)
    refresh_lifetime: Lifetime = timedelta(days=14)
    session_lifetime: Lifetime = timedelta(days=30)
    refresh_retry_window: Window = timedelta(seconds=30)

    audit_retention: Retention = timedelta(days=400)

    signup: Annotated[Literal["open", "closed"], BeforeValidator(_in_any_case)] = "open"
    docs: Switch = "on"
    password_grant: Switch = "on"  # noqa: S105 - a switch, not a secret
    password_min_length: Annotated[int, Field(ge=8, le=256)] = 15
    breach_check_url: str = ""
    # The ceilings of `accounts.formats`: a login refuses what is above, whoever wrote it.
    argon2_memory_kib: Annotated[int, Field(ge=8, le=262_144)] = 19456
    argon2_time_cost: Annotated[int, Field(ge=1, le=64)] = 2
    argon2_parallelism: Annotated[int, Field(ge=1, le=16)] = 1

    @property
    def host(self) -> str:
        return self.bind.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.bind.rpartition(":")[2])

    @property
    def metrics_address(self) -> tuple[str, int]:
        """Return host and port of `metrics_bind`, which must not be empty."""
        host, _, port = self.metrics_bind.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def origins(self) -> frozenset[str]:
        """Whose pages may log in here: our own, and those that are allowed."""
        return frozenset((self.issuer_url, *self.allowed_origins))

    @property
    def secure_cookies(self) -> bool:
        return self.issuer_url.startswith("https://")

    @field_validator("database_url")
    @classmethod
    def _postgres_url(cls, value: SecretStr | None) -> SecretStr | None:
        """Refuse what could be misread; the message never repeats it, since a password is inside."""
        if value is not None and not _POSTGRES.fullmatch(value.get_secret_value()):
            raise ValueError(
                "must be postgresql://user:password@host:port/name, with / # ? @ : and spaces in a password "
                "percent-encoded"
            )
        return value

    @field_validator("bind", "metrics_bind")
    @classmethod
    def _host_and_port(cls, value: str, field: ValidationInfo) -> str:
        if not value and field.field_name == "metrics_bind":
            return value
        host, colon, port = value.rpartition(":")
        if not (colon and host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError("must be HOST:PORT with a port from 1 to 65535, such as 127.0.0.1:8000")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin == "*" or not _is_origin(origin):
                raise ValueError("must list exact origins such as https://app.example.com, without path or wildcard")
            if origin.startswith("http://") and not is_loopback_url(origin):
                raise ValueError("must list https origins (plain http only on localhost)")
            if origin.endswith(_DEFAULT_PORTS[origin.partition(":")[0]]):
                raise ValueError("must list origins as browsers send them: without the default port")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if host != "*" and not _HOST.fullmatch(host.lower()):
                raise ValueError("must list host names without scheme or port, such as identity.internal; or be *")
        return value

    @field_validator("breach_check_url")
    @classmethod
    def _range_api(cls, value: str) -> str:
        try:
            if value:
                check_url(value)
        except ValueError:
            raise ValueError(
                "must be an https address without query, such as https://breaches.example.com/range "
                "(plain http only on localhost)"
            ) from None
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _not_everybody(cls, value: tuple[IPv4Network | IPv6Network, ...]) -> tuple[IPv4Network | IPv6Network, ...]:
        if any(network.prefixlen == 0 for network in value):
            raise ValueError("must not trust every address: anybody could then give any address as theirs")
        return value

    @field_validator("audience")
    @classmethod
    def _some_audience(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one audience")
        if any(character in name for name in value for character in "[]\"'"):
            raise ValueError("must be names separated by spaces or commas, without brackets or quotation marks")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="before")
    @classmethod
    def _issuer_from_bind(cls, data: dict[str, Any]) -> dict[str, Any]:
        """The default issuer is this machine at the bound port; anything a browser or a service uses must be set."""
        if data.get("issuer_url"):
            return data
        port = str(data.get("bind", cls.model_fields["bind"].default)).rpartition(":")[2]
        return {**data, "issuer_url": f"http://localhost:{port}"}

    @field_validator("issuer_url")
    @classmethod
    def _issuer(cls, value: str) -> str:
        if not _is_origin(value):
            raise ValueError(
                "must be scheme, host and optional port, without path or trailing slash: https://id.example.com"
            )
        if value.startswith("http://") and not is_loopback_url(value):
            raise ValueError("must use https (plain http only on localhost)")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.argon2_memory_kib < 8 * self.argon2_parallelism:
            raise ValueError(
                "IDENTITY_ARGON2_MEMORY_KIB must be at least 8 times IDENTITY_ARGON2_PARALLELISM (RFC 9106 3.1)"
            )
        if self.argon2_memory_kib * self.argon2_time_cost > 1_048_576:
            raise ValueError("IDENTITY_ARGON2_MEMORY_KIB times IDENTITY_ARGON2_TIME_COST must be at most 1048576")
        if self.argon2_time_cost * self.argon2_parallelism > 256:
            raise ValueError("IDENTITY_ARGON2_TIME_COST times IDENTITY_ARGON2_PARALLELISM must be at most 256")
        if self.metrics_bind == self.bind:
            raise ValueError("IDENTITY_METRICS_BIND must be another address than IDENTITY_BIND")
        if "refresh_retry_window" not in self.model_fields_set:
            shortest = min(self.refresh_lifetime, self.session_lifetime) / 2
            object.__setattr__(self, "refresh_retry_window", min(self.refresh_retry_window, shortest))
        for name in ("refresh_lifetime", "session_lifetime"):
            if self.refresh_retry_window >= getattr(self, name):
                raise ValueError(f"IDENTITY_REFRESH_RETRY_WINDOW must be shorter than IDENTITY_{name.upper()}")
        return self


def _is_origin(value: str) -> bool:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return False
    host = parts.hostname or ""
    shown = f"[{host}]" if ":" in host else host
    rebuilt = f"{parts.scheme}://{shown}" + (f":{port}" if port is not None else "")
    return parts.scheme in ("http", "https") and value == rebuilt and bool(_HOST.fullmatch(host))


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings with where each came from (`default`, a variable's name, or a variable and its file) and warnings."""

    settings: Settings
    origins: Mapping[str, str]
    warnings: tuple[str, ...]


def load(environ: Mapping[str, str] | None = None) -> Loaded:
    """Read the settings from the environment.

    Raises:
        ConfigurationError: naming the variable and the fix, in one line.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, str] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")
    for field in Settings.model_fields:
        found = [
            (name, environ[name])
            for base in _names(field)
            for name in (base, f"{base}_FILE")
            if environ.get(name, "").strip()
        ]
        if not found:
            if field == "keys_passphrase":
                _refuse_blank_secret(field, environ)
            continue
        if len({_read(name, value) for name, value in found}) > 1:
            raise ConfigurationError(f"{found[0][0]} and {found[1][0]} are both set and differ; keep one of them.")
        name, value = found[0]
        values[field] = _read(name, value)
        origins[field] = f"{name} ({value})" if name.endswith("_FILE") else name
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_first_problem(error, origins)) from None
    return Loaded(settings, origins, _unknown_variables(environ))


def _refuse_blank_secret(field: str, environ: Mapping[str, str]) -> None:
    """A passphrase that was meant to be there and is not would leave keys in clear, and nobody would notice."""
    for name in (PREFIX + field.upper(), f"{PREFIX}{field.upper()}_FILE"):
        if name in environ:
            raise ConfigurationError(f"{name} is set but empty; give it a value or remove it.")


def _names(field: str) -> tuple[str, ...]:
    own = PREFIX + field.upper()
    return (own, UNPREFIXED[field]) if field in UNPREFIXED else (own,)


def _read(name: str, value: str) -> str:
    if not name.endswith("_FILE"):
        return value.strip()
    try:
        content = Path(value).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{name} names a file that cannot be read: {value} ({type(error).__name__})."
        ) from None
    if not content:
        raise ConfigurationError(f"{name} names a file that is empty: {value}.")
    return content


def _first_problem(error: ValidationError, origins: Mapping[str, str]) -> str:
    problem = error.errors(include_input=False, include_url=False)[0]
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message + "."
    field = str(problem["loc"][0])
    name = origins[field] if origins[field] != "default" else PREFIX + field.upper()
    return f"{name}: {message[0].lower()}{message[1:]}."


def _unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    known = [name for field in Settings.model_fields for name in _names(field)]
    known += [f"{name}_FILE" for name in known]
    spelt = [name.removeprefix(PREFIX) for name in known if name.startswith(PREFIX)]
    warnings = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name.removeprefix(PREFIX), spelt, n=1, cutoff=0.0)[0]
            warnings.append(
                f"{name} is not a setting of this service and is ignored. The nearest is {PREFIX}{nearest}."
            )
    return tuple(warnings)


def secret(value: str) -> SecretStr:
    """Wrap a secret that did not come from the environment."""
    return SecretStr(value)

"""`doctor`: looks at an installation as it stands, says what is wrong with it, and how to mend it.

Each check is a function that looks at one thing and returns what it found. Nothing is changed. Nothing but the database
is asked, and the issuer's own address when that is on this machine or `--online` is given.
"""

import asyncio
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.metadata import distribution
from statistics import median
from typing import Annotated, Literal
from urllib.parse import urlsplit

import httpx2
import typer

from identity_service import settings as configuration
from identity_service.accounts import store
from identity_service.accounts.argon2id import SALT_BYTES, Argon2Cost, Argon2id, keep_memory
from identity_service.cli.environment import database, place_of, with_database_url
from identity_service.cli.output import AsJson, counted, print_json
from identity_service.database import SCHEMA_HEAD, Database
from identity_service.embedded import is_made
from identity_service.errors import ConfigurationError, DatabaseUnavailable, KeysUnavailable
from identity_service.revocation import CHANNEL
from identity_service.revocation.feed import RevocationFeed
from identity_service.settings import Loaded, Settings
from identity_service.shell import utc_now
from identity_service.signing.keyring import CLOCK_SKEW, Keyring, KeyState
from identity_service.signing.live import key_folder
from identity_service.verifier.addresses import is_loopback, is_loopback_url

LEAST_POSTGRES = 14
ODD_CLOCK = timedelta(seconds=5)
ONLINE_SECONDS = 5.0
HASHES = 3
SLOWEST_HASH = 0.5
FASTEST_HASH = 0.005


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check looked at, how that stands, and what to do when it should stand otherwise."""

    check: str
    state: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""


def doctor(
    *,
    online: Annotated[
        bool,
        typer.Option(
            "--online", help="Ask at the issuer's address too, as others do. One on this machine is asked anyway."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the installation. Exit 0 when nothing fails, 1 when something does, 5 when the database is away."""
    away = False
    try:
        loaded = configuration.load()
    except ConfigurationError as error:
        findings = [Finding("settings", "fail", error.text, "mend the variable that is named")]
    else:
        findings = [settings_load(loaded), *(check(loaded.settings) for check in OF_SETTINGS)]
        findings += of_keys(loaded.settings, utc_now())
        if online or is_loopback_url(loaded.settings.issuer_url):
            findings += front_door(loaded.settings, insist=online)
        of_the_database = _of_database(loaded.settings)
        findings += of_the_database
        away = any(found.check == "database" and found.state == "fail" for found in of_the_database)
    _show(findings, as_json=as_json)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(5 if away else 1)


def _show(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    for finding in findings:
        print(f"{finding.state:4}  {finding.check:15} {finding.text}")
        if finding.fix:
            print(f"{'':21} -> {finding.fix}")


# Settings


def settings_load(loaded: Loaded) -> Finding:
    if loaded.warnings:
        return Finding("settings", "warn", " ".join(loaded.warnings), "remove or rename these variables")
    return Finding("settings", "ok", "they load, and every IDENTITY_ variable is known")


def issuer(settings: Settings) -> Finding:
    if settings.issuer_url.startswith("https://"):
        return Finding("issuer", "ok", settings.issuer_url)
    text = f"{settings.issuer_url} means another machine to everybody else"
    return Finding("issuer", "warn", text, "set IDENTITY_ISSUER_URL to the https origin that others use")


def hosts(settings: Settings) -> Finding:
    if "*" in settings.allowed_hosts:
        fix = "list the names in IDENTITY_ALLOWED_HOSTS instead of *"
        return Finding("hosts", "warn", "requests for any host name are answered", fix)
    names = (urlsplit(settings.issuer_url).hostname or "", *settings.allowed_hosts)
    return Finding("hosts", "ok", f"answers to {', '.join(names)} and to this machine's names")


def cookies(settings: Settings) -> Finding:
    if settings.secure_cookies:
        return Finding("cookies", "ok", "Secure, HttpOnly, SameSite=Strict, __Host-")
    return Finding("cookies", "warn", "without Secure, since the issuer is plain http", "use an https issuer")


def proxy(settings: Settings) -> Finding:
    """An https issuer on a loopback address is behind something that ends TLS."""
    trusted = settings.trusted_proxies
    if settings.secure_cookies and is_loopback(settings.host) and not trusted:
        text = "likely behind a proxy, whose address stands for everybody's in sessions, audit and throttling"
        return Finding("proxy", "warn", text, "name it in IDENTITY_TRUSTED_PROXIES")
    return Finding("proxy", "ok", f"trusted: {', '.join(map(str, trusted)) or 'none'}")


def sign_up(settings: Settings) -> Finding:
    if settings.signup == "open":
        text = "anybody can make an account"
        return Finding("sign-up", "warn", text, "IDENTITY_SIGNUP=closed, unless that is meant")
    return Finding("sign-up", "ok", "closed")


def password_grant(settings: Settings) -> Finding:
    if settings.password_grant == "on":  # noqa: S105 - a switch, not a secret
        fix = "IDENTITY_PASSWORD_GRANT=off when frontends use /login (RFC 9700 2.4)"
        return Finding("password grant", "warn", "first-party clients can send passwords to /token", fix)
    return Finding("password grant", "ok", "off")


def hashing_cost(settings: Settings) -> Finding:
    """Hash a few times with the configured cost, as logins do."""
    cost = Argon2Cost.of(settings)
    keep_memory(cost)
    hasher = Argon2id(cost)
    taken = []
    for _ in range(HASHES):
        began = time.perf_counter()
        hasher.hash("correct horse battery staple", bytes(SALT_BYTES))
        taken.append(time.perf_counter() - began)
    seconds = median(taken)
    text = f"one takes {seconds * 1000:.1f} ms here: {1 / seconds:.0f} logins per second and core"
    if seconds > SLOWEST_HASH:
        return Finding("password hashes", "warn", text, "lower IDENTITY_ARGON2_TIME_COST, or give it a faster machine")
    if seconds < FASTEST_HASH:
        return Finding(
            "password hashes", "warn", text, "unset IDENTITY_ARGON2_MEMORY_KIB and IDENTITY_ARGON2_TIME_COST"
        )
    return Finding("password hashes", "ok", text)


def hashing_build(_: Settings) -> Finding:
    """Say which Argon2 runs. The published wheel is for any processor, and half as fast as one built for this one."""
    bindings = distribution("argon2-cffi-bindings")
    published = any(tag in (bindings.read_text("WHEEL") or "") for tag in ("manylinux", "musllinux", "macosx"))
    text = f"argon2-cffi-bindings {bindings.version}, " + ("the published wheel" if published else "built from source")
    if published and platform.machine() in ("x86_64", "AMD64"):
        text += ", which is for any processor; `make fast-hash` builds it for this one: about twice the logins"
    return Finding("argon2", "ok", text)


OF_SETTINGS: tuple[Callable[[Settings], Finding], ...] = (
    issuer, hosts, cookies, proxy, sign_up, password_grant, hashing_cost, hashing_build,
)  # fmt: skip


# Keys


def of_keys(settings: Settings, now: datetime) -> list[Finding]:
    """Look at the keys folder, and if it can be read at the keys."""
    folder = key_folder(settings)
    try:
        ring = folder.read()
    except ConfigurationError as error:
        fix = "`identity-service serve` makes the keys of a new installation" if folder.is_unused() else ""
        return [Finding("keys folder", "fail", error.text, fix)]
    private = Finding("keys folder", "ok", f"{settings.keys_dir} is private")
    if not os.access(settings.keys_dir, os.W_OK):
        text = f"{settings.keys_dir} cannot be written: no key can be rotated or revoked from here"
        private = Finding("keys folder", "warn", text, "make it writable")
    return [private, encryption(settings), active_key(settings, ring, now), standby_key(ring, now)]


def encryption(settings: Settings) -> Finding:
    """Every private half, not only those made since the passphrase was set."""
    clear = [path.name for path in settings.keys_dir.glob("*.pem") if b"ENCRYPTED" not in path.read_bytes()[:64]]
    if not clear:
        return Finding("keys at rest", "ok", "encrypted")
    fix = "set IDENTITY_KEYS_PASSPHRASE_FILE"
    if settings.keys_passphrase is not None:
        fix = "`identity-service keys rotate --now`, twice"
    return Finding("keys at rest", "warn", f"not encrypted: {counted(len(clear), 'private key')}", fix)


def active_key(settings: Settings, ring: Keyring, now: datetime) -> Finding:
    try:
        key = ring.signer(now)
    except KeysUnavailable as error:
        fix = "restore the folder from a backup; without one, `identity-service keys rotate --now`"
        return Finding("active key", "fail", f"nothing can sign: {error.detail}", fix)
    age = now - (key.signs_from or now)
    text = f"{key.kid} has signed for {counted(age.days, 'day')}"
    if settings.key_rotation_period and age > settings.key_rotation_period + timedelta(days=1):
        return Finding(
            "active key", "warn", f"{text}, and a running service would have rotated it", "run it; see its log"
        )
    if not settings.key_rotation_period and age > timedelta(days=90):
        return Finding("active key", "warn", text, "`make rotate-keys`, or set IDENTITY_KEY_ROTATION_PERIOD")
    return Finding("active key", "ok", text)


def standby_key(ring: Keyring, now: datetime) -> Finding:
    standby = [status.key for status in ring.statuses(now) if status.state is KeyState.STANDBY]
    if not standby:
        text = "none: verifiers do not know yet what will sign next"
        return Finding("standby key", "fail", text, "`identity-service keys rotate` makes one")
    if standby[0].private is None:
        text = f"{standby[0].kid}.pem is missing: it cannot sign when its turn comes"
        return Finding("standby key", "fail", text, "restore it from a backup; or `identity-service keys rotate`")
    return Finding("standby key", "ok", f"{standby[0].kid} is published")


# The front door


def front_door(settings: Settings, *, insist: bool) -> list[Finding]:
    """Ask at the issuer's address what other services ask there."""
    try:
        with httpx2.Client(timeout=ONLINE_SECONDS, follow_redirects=False) as client:
            began = utc_now()
            metadata = client.get(f"{settings.issuer_url}/.well-known/oauth-authorization-server")
            ended = utc_now()
            jwks = client.get(f"{settings.issuer_url}/.well-known/jwks.json")
        told, keys = metadata.json(), jwks.json()["keys"]
        told_issuer, kids = told["issuer"], {key["kid"] for key in keys}
    except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
        text = f"nothing of ours answers at {settings.issuer_url} ({type(error).__name__}: {error!s:.200})"
        fix = "start the service, or mend DNS, proxy or certificate in front of it"
        if "CERTIFICATE_VERIFY_FAILED" in text:
            fix = "name the certificate's authority in SSL_CERT_FILE, or mend the certificate"
        return [Finding("front door", "fail" if insist else "warn", text, fix)]
    return [
        same_issuer(settings, told_issuer),
        same_keys(settings, kids, began),
        same_time("front door clock", metadata.headers.get("date"), began, ended),
    ]


def same_issuer(settings: Settings, told: object) -> Finding:
    if told != settings.issuer_url:
        text = f"{settings.issuer_url} answers that it is {told!s:.100}"
        return Finding("front door", "fail", text, "give every process the same IDENTITY_ISSUER_URL")
    return Finding("front door", "ok", f"{settings.issuer_url} answers, and names itself so")


def same_keys(settings: Settings, kids: set[str], now: datetime) -> Finding:
    try:
        ours = {key.kid for key in key_folder(settings).read().published(now)}
    except ConfigurationError:
        ours = set()
    if kids != ours:
        fix = "give every process the same keys folder, and let no cache keep the JWKS for longer than it says"
        return Finding("front door keys", "fail", "the JWKS there is not the one of this folder", fix)
    return Finding("front door keys", "ok", "the JWKS there is the one of this folder")


def same_time(check: str, date: str | None, began: datetime, ended: datetime) -> Finding:
    """Compare a Date header, which has whole seconds, with our clock before and after."""
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return Finding(check, "warn", "the answer has no Date header")
    theirs = theirs.replace(tzinfo=theirs.tzinfo or UTC)  # "-0000" is UTC, and Python gives it no zone
    apart = max(began - theirs - timedelta(seconds=1), theirs - ended, timedelta(0))
    return _clock(check, apart)


def _clock(check: str, apart: timedelta) -> Finding:
    text = f"{apart.total_seconds():.1f} s from ours"
    if apart > ODD_CLOCK:
        fix = "let the machines keep their time by NTP"
        return Finding(check, "fail" if apart > CLOCK_SKEW else "warn", text, fix)
    return Finding(check, "ok", text)


# The database


def _of_database(settings: Settings) -> list[Finding]:
    if settings.database_url is None and not is_made(settings.embedded_dir):
        text = f"none yet in {settings.embedded_dir.absolute()}: `serve` makes one there, which is for development"
        return [Finding("database", "warn", text, "set DATABASE_URL")]
    try:
        with with_database_url(settings) as ready:
            return asyncio.run(of_database(ready, embedded=settings.database_url is None))
    except DatabaseUnavailable as error:
        return [Finding("database", "fail", error.text, f"what the driver says: {error.detail}")]


async def of_database(settings: Settings, *, embedded: bool = False) -> list[Finding]:
    """Look at the database, and if the schema is there at what is in it."""
    async with database(settings) as db:
        assert settings.database_url is not None, "see with_database_url"
        place = place_of(settings.database_url.get_secret_value())
        found = [await server(db, place, embedded=embedded), await database_clock(db), await pooler(db)]
        migrated = await schema(db)
        if migrated.state == "fail":
            return [*found, migrated]
        return [*found, migrated, await revocations(db), await administrator(db)]


async def server(db: Database, place: str, *, embedded: bool) -> Finding:
    found = await db.server()
    text = f"PostgreSQL {found.version} at {place}"
    if found.read_only:
        fix = "name the primary; of several hosts `?target_session_attrs=primary` finds it"
        return Finding("database", "fail", f"{text} takes no writes: it is a standby, or was made read-only", fix)
    if found.version < LEAST_POSTGRES:
        return Finding("database", "warn", text, f"upgrade to PostgreSQL {LEAST_POSTGRES} or newer")
    if embedded:
        return Finding("database", "warn", "the embedded Postgres, which is for development", "set DATABASE_URL")
    return Finding("database", "ok", text)


async def database_clock(db: Database) -> Finding:
    began = utc_now()
    theirs = (await db.server()).now
    return _clock("database clock", max(began - theirs, theirs - utc_now(), timedelta(0)))


async def pooler(db: Database) -> Finding:
    """A pooler in transaction mode forwards no notifications."""
    if await db.hears(CHANNEL):
        return Finding("pooler", "ok", "notifications arrive: none, or one in session mode")
    text = "notifications do not arrive: revocations take up to half a second longer"
    return Finding("pooler", "warn", text, "connect to Postgres directly, or let the pooler keep sessions")


async def schema(db: Database) -> Finding:
    revision = await db.schema_revision()
    if revision is None or revision < SCHEMA_HEAD:
        text = f"stands at {revision or 'nothing'}, and this release needs {SCHEMA_HEAD}"
        return Finding("schema", "fail", text, "`identity-service migrate`")
    newer = "" if revision == SCHEMA_HEAD else f", newer than the {SCHEMA_HEAD} of this release"
    return Finding("schema", "ok", f"stands at {revision}{newer}")


async def revocations(db: Database) -> Finding:
    """Look at them as a running service does: the role may lack a privilege that nothing else needs."""
    try:
        await RevocationFeed(db).look(utc_now())
    except DatabaseUnavailable as error:
        text = f"they cannot be read, and nobody hears of a logout: {error.detail}"
        return Finding("revocations", "fail", text, "grant the role what it lacks")
    return Finding("revocations", "ok", "they can be read")


async def administrator(db: Database) -> Finding:
    async with db.connection() as connection:
        administrators = await store.count_administrators(connection)
    if administrators:
        return Finding("administrator", "ok", "there is one who can log in")
    fix = "`identity-service users create NAME --role admin`, or `roles grant NAME admin`"
    return Finding("administrator", "warn", "nobody can use the administration API", fix)

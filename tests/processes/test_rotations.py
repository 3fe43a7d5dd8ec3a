"""Key rotations under traffic: nobody who verifies our tokens refuses one, be it with our verifier or with another.

What takes a quarter of an hour in real life takes three seconds here: the publish window is 3 s instead of 900, and the
times for which verifiers hold keys (300 or 600 s) and ask for no unknown one (30 s) are divided by the same number. How
soon the issuer sees a changed folder, within 2 s, is as it is.
"""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
import jwt
import pytest

from tests.conftest import bearer
from tests.processes.conftest import HURRY, Installation
from tests.services import PLAIN, Service, refresh, sign_up

PAUSE = 0.03
"""Seconds between two new tokens, and between two questions to a verifier."""
JOSE = Path(__file__).parents[2] / ".local/node"
HAS_JOSE = shutil.which("node") is not None and (JOSE / "node_modules/jose").exists()

Verify = Callable[[str], str]
"""Returns the key id of a token that was accepted, or says what was wrong with it."""


class Tokens:
    """The tokens of one session, which gets a new one all the time."""

    def __init__(self, issuer: Service) -> None:
        self._issuer = issuer
        self.all: list[str] = []
        self.keys: set[str] = set()
        """Those that signed them."""
        self._take(sign_up(issuer, "rotating"))
        self.ended = Event()

    def renew_for_ever(self) -> None:
        while not self.ended.wait(PAUSE):
            self._take(refresh(self._issuer, self._last))

    def _take(self, tokens: dict[str, Any]) -> None:
        self._last = tokens
        self.all.append(tokens["access_token"])
        self.keys.add(key_id(tokens["access_token"]))

    def wait_for_keys(self, number: int) -> None:
        """Wait until that many keys have signed one of them."""
        end = time.monotonic() + 20
        while len(self.keys) < number:
            assert time.monotonic() < end, "no other key signs"
            time.sleep(PAUSE)

    def show(self, verify: Verify) -> set[str]:
        """Have the first token, one from the middle and the newest verified until the end; return what was said."""
        said = set()
        while not self.ended.wait(PAUSE):
            said |= {verify(self.all[place]) for place in (0, len(self.all) // 2, -1)}
        return said


def key_id(token: str) -> str:
    kid: str = jwt.get_unverified_header(token)["kid"]
    return kid


@contextmanager
def ours(installation: Installation) -> Iterator[Verify]:
    with httpx2.Client(base_url=installation.hurried.url, verify=PLAIN) as http:

        def verify(token: str) -> str:
            answer = http.get("/", headers=bearer(token))
            return key_id(token) if answer.status_code == 200 else answer.text

        yield verify


@contextmanager
def stock_pyjwt(installation: Installation) -> Iterator[Verify]:
    issuer = installation.url
    keys = jwt.PyJWKClient(f"{issuer}/.well-known/jwks.json", lifespan=300 / HURRY, cooldown_duration=30 / HURRY)

    def verify(token: str) -> str:
        try:
            jwt.decode(token, keys.get_signing_key_from_jwt(token), algorithms=["RS256"], audience="api", issuer=issuer)
        except jwt.PyJWTError as error:
            return repr(error)
        return key_id(token)

    yield verify


@contextmanager
def node_jose(installation: Installation) -> Iterator[Verify]:
    program = Path(__file__).with_name("jose.mjs").read_text()
    command = ["node", "--input-type=module", "--eval", program, installation.url, str(HURRY)]
    with subprocess.Popen(command, cwd=JOSE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, answered = process.stdin, process.stdout
        assert asked is not None
        assert answered is not None

        def verify(token: str) -> str:
            asked.write(f"{token}\n")
            asked.flush()
            return answered.readline().strip().removeprefix("ok ")

        yield verify
        asked.close()


VERIFIERS = {"our verifier": ours, "PyJWT": stock_pyjwt, "jose": node_jose}


@pytest.fixture(scope="session")
def outcomes(installation: Installation, rounds: int) -> dict[str, set[str]]:
    """Rotate the keys three times under traffic; return what each verifier said of the tokens, and who signed them."""
    tokens = Tokens(installation.issuer)
    available = {name: make for name, make in VERIFIERS.items() if name != "jose" or HAS_JOSE}
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        verifiers = {name: stack.enter_context(make(installation)) for name, make in available.items()}
        renewing = threads.submit(tokens.renew_for_ever)
        shown = {name: threads.submit(tokens.show, verify) for name, verify in verifiers.items()}
        try:
            installation.issuer.command("keys", "rotate")
            for number in range(1 + rounds):
                installation.issuer.command("keys", "rotate")
                tokens.wait_for_keys(number + 3)
            time.sleep(20 * PAUSE)
        finally:
            tokens.ended.set()
        renewing.result()
        said = {name: outcome.result() for name, outcome in shown.items()}
    return said | {"signed": tokens.keys}


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_rotations_under_traffic_refuse_no_token(outcomes: dict[str, set[str]], verifier: str) -> None:
    if verifier not in outcomes:
        pytest.skip("2026-11-22: Node or its jose is missing; with node 20 and npm, `make jose` gets it")
    assert len(outcomes["signed"]) >= 4
    assert outcomes[verifier] == outcomes["signed"]

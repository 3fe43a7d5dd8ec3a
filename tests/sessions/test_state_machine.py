"""Any history of logins, refreshes, retries, replays, revocations, pauses and disablings, against a small model."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from uuid import UUID

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from identity_service.accounts import registration
from tests.conftest import TESTER, Account, Api, StartApi

IDLE = timedelta(days=14)
ABSOLUTE = timedelta(days=30)
WINDOW = timedelta(seconds=30)
_names = count()


@dataclass
class Model:
    """What a session should do: the whole rule."""

    ends_at: datetime
    tokens: list[str]
    issued_at: list[datetime]
    alive: bool = True

    def refresh(self, generation: int, now: datetime, *, welcome: bool) -> int | None:
        """Return the generation that a refresh should answer with, None for a refusal."""
        expired = now >= min(self.issued_at[generation] + IDLE, self.ends_at)
        if expired or not self.alive or not welcome:
            return None
        newest = len(self.tokens) - 1
        if generation == newest:
            return newest + 1
        if generation == newest - 1 and now - self.issued_at[newest] <= WINDOW:
            return newest
        if now < min(self.issued_at[newest] + IDLE, self.ends_at):
            self.alive = False
        return None


class Sessions(RuleBasedStateMachine):
    api: Api
    runner: asyncio.Runner
    sessions = Bundle("sessions")

    @initialize()
    def sign_up(self) -> None:
        self.user: Account = self.runner.run(self.api.sign_up(f"user{next(_names)}"))
        self.welcome = True
        self.models: list[Model] = []

    @rule(target=sessions)
    def log_in(self) -> Model | None:
        self.runner.run(self.api.forget_failures())  # those of the disabled user: throttling has its own tests
        answer = self.runner.run(
            self.api.token(grant_type="password", username=self.user.username, password=self.user.password)
        )
        assert (answer.status_code == 200) == self.welcome
        if not self.welcome:
            return None
        now = self.api.clock()
        model = Model(now + ABSOLUTE, [answer.json()["refresh_token"]], [now])
        self.models.append(model)
        return model

    @rule(model=sessions, back=st.integers(0, 3))
    def refresh(self, model: Model | None, back: int) -> None:
        """Present the newest token, the one just spent, or an older one."""
        if model is None:
            return
        generation = max(0, len(model.tokens) - 1 - back)
        expected = model.refresh(generation, self.api.clock(), welcome=self.welcome)
        answer = self.runner.run(self.api.refresh(model.tokens[generation]))
        assert (answer.status_code == 200) == (expected is not None), (generation, answer.text)
        if expected is None:
            assert answer.json()["error"] == "invalid_grant"
        elif expected < len(model.tokens):
            assert answer.json()["refresh_token"] == model.tokens[expected]
        else:
            model.tokens.append(answer.json()["refresh_token"])
            model.issued_at.append(self.api.clock())

    @rule(model=sessions, back=st.integers(0, 2))
    def revoke(self, model: Model | None, back: int) -> None:
        if model is None:
            return
        generation = max(0, len(model.tokens) - 1 - back)
        answer = self.runner.run(self.api.http.post("/revoke", data={"token": model.tokens[generation]}))
        assert answer.status_code == 200
        if self.api.clock() < min(model.issued_at[generation] + IDLE, model.ends_at):
            model.alive = False

    @rule(pause=st.sampled_from([5, 29, 31, 3600, 86400, 13 * 86400, 15 * 86400]))
    def wait(self, pause: int) -> None:
        self.api.clock.advance(seconds=pause)

    @rule()
    def disable(self) -> None:
        """Every session ends, and stays ended when the account is opened again."""
        self._transact(registration.disable, by=TESTER, now=self.api.clock())
        self.welcome = False
        for model in self.models:
            model.alive = False

    @rule()
    def enable(self) -> None:
        self._transact(registration.enable, by=TESTER, now=self.api.clock())
        self.welcome = True

    def _transact(self, change, **facts) -> None:
        self.runner.run(self.api.database.transact(lambda db: change(db, UUID(self.user.id), **facts)))


@pytest.fixture
def machine(start_api: StartApi) -> Iterator[type[Sessions]]:
    with asyncio.Runner() as runner:
        service = start_api(key_rotation_period="0")
        api = runner.run(service.__aenter__())
        try:
            yield type("Sessions", (Sessions,), {"api": api, "runner": runner})
        finally:
            runner.run(service.__aexit__(None, None, None))


def test_every_history_is_answered_as_the_model_says(machine):
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(
            max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )

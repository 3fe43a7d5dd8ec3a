"""Signing for several requests at once: what is asked for in one pass of the event loop is signed in one go."""

import asyncio
from typing import TypeAlias

from identity_service.tokens import jws
from identity_service.tokens.jws import Unsigned

_Turn: TypeAlias = "asyncio.Future[list[str]]"


class SigningRounds:
    """Signs in rounds.

    Refreshes come back from Postgres in groups. Each signature pushes Python out of the processor's caches, so a group
    is signed in one go.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()  # once: on Python 3.11 it asks the system each time
        self._asked: list[tuple[tuple[Unsigned, ...], _Turn]] = []

    async def sign(self, *tokens: Unsigned) -> list[str]:
        """Return the tokens with their signatures."""
        turn: _Turn = self._loop.create_future()
        if not self._asked:
            self._loop.call_soon(self._sign_all)
        self._asked.append((tokens, turn))
        return await turn

    def _sign_all(self) -> None:
        asked, self._asked = self._asked, []
        for tokens, turn in asked:
            if turn.done():  # whoever asked has left
                continue
            try:
                turn.set_result([jws.signed(token) for token in tokens])
            except Exception as error:  # noqa: BLE001 - whoever asked raises it, and the others get theirs
                turn.set_exception(error)

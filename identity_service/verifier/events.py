"""Server-sent events (WHATWG HTML 9.2) as they arrive in pieces. httpx2 reads them too, but hides the comments that
tell a quiet stream from a dead one.
"""

from dataclasses import dataclass

MAX_EVENT_LENGTH = 64 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    """One event; `id` is the last one seen in the stream so far."""

    name: str
    data: str
    id: str


class EventReader:
    """Takes bytes, gives events.

    Args:
        last_id: the id to resume from; replaced by each event that has one.
    """

    def __init__(self, last_id: str = "") -> None:
        self.last_id = last_id
        self._rest = b""
        self._name = ""
        self._data: list[str] = []
        self._length = 0

    def feed(self, part: bytes) -> list[Event]:
        """Return the events that this part completes.

        Raises:
            ValueError: an event is too long, or not UTF-8.
        """
        text = self._rest + part
        # The second half of a line break may still be on its way.
        held_back = text[-1:] if text.endswith(b"\r") else b""
        *lines, rest = text[: len(text) - len(held_back)].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest + held_back
        if self._length + len(self._rest) > MAX_EVENT_LENGTH:
            raise ValueError("an event is too long")
        return [event for line in lines if (event := self._take(line)) is not None]

    def _take(self, line: bytes) -> Event | None:
        if not line:
            event = Event(self._name or "message", "\n".join(self._data), self.last_id) if self._data else None
            self._name, self._data, self._length = "", [], 0
            return event
        self._length += len(line)
        if self._length > MAX_EVENT_LENGTH:
            raise ValueError("an event is too long")
        name, _, value = line.decode().partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name == "id" and value.isascii() and value.isprintable() and len(value) <= 256:
            self.last_id = value
        return None

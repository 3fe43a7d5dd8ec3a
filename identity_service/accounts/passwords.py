"""What a password must be (NIST SP 800-63B-4 3.1.1): long, normalised, and not the first thing anyone would try.

Running Argon2id is next door in `hashing`.
"""

import re
import unicodedata
from math import prod

from identity_service.errors import PasswordRejected

MAX_LENGTH = 256
"""Code points. Longer input is refused before it is hashed."""

LEAST_GUESSES_LOG10 = 8
"""How many guesses, as a power of ten, an attacker must need by zxcvbn's estimate."""

_WINDOW = 32
"""zxcvbn's work grows with the square of what it is given: the first and the last so many characters are estimated."""

_MOST_READINGS = 16
"""zxcvbn tries every reading of symbols that stand for letters; ten different ones have thousands and cost seconds."""

_PLAIN_SYMBOLS = "^&*)-=_;:,.?/~`'\"\\]}>#"
_SERVICE_NAMES = frozenset(
    ("identity", "service", "identity service", "identity-service", "identity.service", "identityservice")
)


def normalise(unverified_password: str) -> str:
    """Return the password as it is counted, compared and hashed: NFC, nothing else changed.

    Raises:
        PasswordRejected: it is empty, far too long, or holds control characters or lone surrogates.
    """
    if len(unverified_password) > 4 * MAX_LENGTH:
        raise PasswordRejected("too_long", f"The password must have at most {MAX_LENGTH} characters.")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in unverified_password):
        raise PasswordRejected("invalid_characters", "The password must not contain control characters.")
    password = unicodedata.normalize("NFC", unverified_password)
    if len(password) > MAX_LENGTH:
        raise PasswordRejected("too_long", f"The password must have at most {MAX_LENGTH} characters.")
    if not password:
        raise PasswordRejected("too_short", "The password must not be empty.")
    return password


def check_length(password: str, *, min_length: int) -> None:
    """Refuse a normalised password that is too short, counted in code points."""
    if len(password) < min_length:
        raise PasswordRejected("too_short", f"The password must have at least {min_length} characters.")


def check_guessability(password: str, *, context: tuple[str, ...]) -> None:
    """Refuse a password that is common, patterned, or made of what is known about its owner.

    Takes up to a tenth of a second: call it in a thread.

    Args:
        context: the username, the e-mail address and the like.
    """
    from zxcvbn import zxcvbn

    owners = _context_words(context)
    known = sorted(owners | _SERVICE_NAMES)
    estimates = []
    for form in dict.fromkeys((password, unicodedata.normalize("NFKC", password))):  # width is no strength
        plain = _with_few_readings(form)
        parts = dict.fromkeys((plain[:_WINDOW], plain[-_WINDOW:]))
        strongest = max((zxcvbn(part, user_inputs=known) for part in parts), key=lambda found: found["guesses"])
        estimates.append(strongest)
    if all(estimate["guesses_log10"] >= LEAST_GUESSES_LOG10 for estimate in estimates):
        return
    matches = [match for estimate in estimates for match in _matches(estimate["sequence"])]
    patterns = {match["pattern"] for match in matches}
    found = {match["matched_word"] for match in matches if match.get("dictionary_name") == "user_inputs"}
    if found - (_SERVICE_NAMES - owners):
        text = "The password must not be made of the username or the e-mail address."
        raise PasswordRejected("contains_username", text)
    if found:
        raise PasswordRejected("common", "The password must not be made of the name of this service.")
    if "repeat" in patterns:
        raise PasswordRejected("repetitive", "The password repeats itself too much to be safe.")
    if patterns & {"sequence", "spatial"}:
        raise PasswordRejected("sequential", "The password follows a sequence or a row of keys.")
    raise PasswordRejected("common", "The password is one of those that are tried first.")


def _context_words(context: tuple[str, ...]) -> set[str]:
    """Return what is known about the owner: each text whole, without its domain, its parts, and its parts joined."""
    words = set()
    for text in context:
        for known in (text.casefold(), text.casefold().partition("@")[0]):
            parts = re.split(r"[\W_]+", known)
            words |= {known, "".join(parts), *parts}
    return {word for word in words if len(word) > 2}


def _with_few_readings(password: str) -> str:
    """Replace symbols, each by its own, until those that stand for letters leave few readings."""
    from zxcvbn.matching import L33T_TABLE

    free = [symbol for symbol in _PLAIN_SYMBOLS if symbol not in password]
    for symbol in dict.fromkeys(reversed(password)):  # pragma: no branch - digits and one symbol have twelve at most
        readings = prod(max(1, sum(substitute in password for substitute in row)) for row in L33T_TABLE.values())
        if readings <= _MOST_READINGS or not free:
            break
        if not symbol.isalnum() and any(symbol in row for row in L33T_TABLE.values()):
            password = password.replace(symbol, free.pop())
    return password


def _matches(sequence: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the matches with those inside repeats: `alicealice` is a repeat of a username."""
    found = []
    for match in sequence:
        found.append(match)
        inner = match.get("base_matches")
        if isinstance(inner, list):
            found += _matches(inner)
    return found

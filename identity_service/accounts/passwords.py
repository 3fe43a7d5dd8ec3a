"""What a password must be (NIST SP 800-63B-4 3.1.1): long, normalised, and not the first thing anyone would try.

Running Argon2id is next door in `hashing`.
"""

import unicodedata

from identity_service.errors import PasswordRejected

MAX_LENGTH = 256
"""Code points. Longer input is refused before it is hashed."""

LEAST_SCORE = 3
"""On zxcvbn's scale from 0 to 4: what takes an offline attacker at least 10^8 guesses."""

_ESTIMATED_LENGTH = 72
"""zxcvbn's work grows with the square of what it is given; the rest of a longer password can only add strength."""


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

    Takes milliseconds: call it in a thread.

    Args:
        context: the username, the e-mail address and the like.
    """
    from zxcvbn import zxcvbn

    estimate = zxcvbn(password[:_ESTIMATED_LENGTH], user_inputs=list(_context_words(context)))
    if estimate["score"] >= LEAST_SCORE:
        return
    matches = list(_matches(estimate["sequence"]))
    patterns = {match["pattern"] for match in matches}
    dictionaries = {match.get("dictionary_name") for match in matches}
    if "user_inputs" in dictionaries:
        raise PasswordRejected(
            "contains_username", "The password must not be made of the username or the e-mail address."
        )
    if "repeat" in patterns:
        raise PasswordRejected("repetitive", "The password repeats itself too much to be safe.")
    if patterns & {"sequence", "spatial"}:
        raise PasswordRejected("sequential", "The password follows a sequence or a row of keys.")
    raise PasswordRejected("common", "The password is one of those that are tried first.")


def _context_words(context: tuple[str, ...]) -> set[str]:
    words = {word for text in context for word in (text, *text.replace("@", " ").replace(".", " ").split())}
    return {word.lower() for word in words if len(word) > 2}


def _matches(sequence: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the matches with those inside repeats: `alicealice` is a repeat of a username."""
    found = []
    for match in sequence:
        found.append(match)
        inner = match.get("base_matches")
        if isinstance(inner, list):
            found += _matches(inner)
    return found

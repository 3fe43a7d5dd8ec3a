"""Ids as others write them."""

from uuid import UUID


def read_uuid(unverified_id: str) -> UUID | None:
    """Return the UUID that is written here as we write it (RFC 9562 4), in either case; None when there is none."""
    try:
        found = UUID(unverified_id)
    except ValueError:
        return None
    return found if str(found) == unverified_id.lower() else None

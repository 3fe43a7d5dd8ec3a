"""`python -m identity_service` and the `identity-service` script: the command line."""

from datetime import UTC, datetime

# Before the imports that take their time: a command is asked for when it is typed.
STARTED_AT = datetime.now(UTC)


def main() -> None:
    from identity_service.cli import run

    run(started_at=STARTED_AT)


if __name__ == "__main__":
    main()

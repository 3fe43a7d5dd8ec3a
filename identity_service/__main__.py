"""`python -m identity_service` and the `identity-service` script: the command line."""

import sys
from datetime import UTC, datetime

# Before the imports that take their time: a command is asked for when it is typed.
STARTED_AT = datetime.now(UTC)


def main() -> None:
    try:
        from identity_service.cli import run
    except ModuleNotFoundError as error:
        # `pip install` without the extra brings the verifier only, and this script with it.
        sys.stderr.write(f"identity-service: {error.name} is missing; install identity-service[server].\n")
        sys.exit(2)
    run(started_at=STARTED_AT)


if __name__ == "__main__":
    main()

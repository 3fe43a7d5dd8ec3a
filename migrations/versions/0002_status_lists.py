"""Every session owns an index in a status list and knows when its tokens end; a revocation records both.

Processes of 0001 may go on during this and until 0004, but must have stopped before any of this release starts: what
they revoke names no index, and other services would not hear of it.
"""

import secrets

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE SEQUENCE status_index_seq MINVALUE 0 START WITH 0")
    # 2^20 consecutive numbers share a list. Within it their order is a bijection (every step can be undone), so no two
    # meet and none is used again; and one of this database's own, so that a token tells nobody how many logins there
    # were before it.
    steps = "\n".join(
        f"place := ((place + turn * {_odd()}) * {_odd()}) & 1048575; place := place # (place >> 10);" for _ in range(3)
    )
    op.execute(f"""
        CREATE FUNCTION next_status_index() RETURNS bigint LANGUAGE plpgsql VOLATILE AS $$
        DECLARE
            number bigint := nextval('status_index_seq');
            list bigint := number >> 20;
            turn bigint := (list & 1048575) + 1;
            place bigint := number & 1048575;
        BEGIN
            {steps}
            RETURN list << 20 | place;
        END
        $$
    """)
    # With a default, so that the previous release can go on inserting sessions. In two steps, because a default that
    # differs from row to row would have the whole table written anew while nobody can log in or refresh; what sessions
    # there are get theirs in 0004.
    op.execute("ALTER TABLE sessions ADD COLUMN status_index bigint")
    op.execute("ALTER TABLE sessions ALTER COLUMN status_index SET DEFAULT next_status_index()")
    # No verifier takes a token of more than a day.
    op.execute(
        "ALTER TABLE sessions ADD COLUMN access_expires_at timestamptz NOT NULL DEFAULT now() + interval '1 day'"
    )
    op.execute("ALTER TABLE revoked_tokens ADD COLUMN status_index bigint")
    # By the database's clock: replicas look for what is new, and theirs may disagree.
    op.execute("ALTER TABLE revoked_tokens ADD COLUMN recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()")
    op.execute("CREATE INDEX revoked_tokens_recorded_at_idx ON revoked_tokens (recorded_at)")


def downgrade() -> None:
    op.execute("ALTER TABLE revoked_tokens DROP COLUMN recorded_at, DROP COLUMN status_index")
    op.execute("ALTER TABLE sessions DROP COLUMN access_expires_at, DROP COLUMN status_index")
    op.execute("DROP FUNCTION next_status_index")
    op.execute("DROP SEQUENCE status_index_seq")


def _odd() -> int:
    return secrets.randbelow(1 << 19) << 1 | 1

"""Every session owns an index in a status list and knows when its tokens end; a revocation records both."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE SEQUENCE status_index_seq MINVALUE 0 START WITH 0")
    # With a default, so that the previous release can go on inserting sessions while this one is rolled out.
    op.execute("ALTER TABLE sessions ADD COLUMN status_index bigint NOT NULL DEFAULT nextval('status_index_seq')")
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
    op.execute("DROP SEQUENCE status_index_seq")

"""Where sessions began, who failed too often, and resets of passwords."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE sessions ADD COLUMN address text, ADD COLUMN user_agent text")
    # The key is a digest: people type passwords where usernames belong.
    op.execute("""
        CREATE TABLE throttles (
            key            bytea PRIMARY KEY,
            failures       integer NOT NULL,
            last_failed_at timestamptz NOT NULL,
            blocked_until  timestamptz NOT NULL
        ) WITH (fillfactor = 90)
    """)
    op.execute("CREATE INDEX throttles_last_failed_at_idx ON throttles (last_failed_at)")
    op.execute("""
        CREATE TABLE password_resets (
            user_id      uuid PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
            token_digest bytea NOT NULL UNIQUE,
            created_at   timestamptz NOT NULL,
            expires_at   timestamptz NOT NULL
        )
    """)


def downgrade() -> None:
    op.execute("DROP TABLE password_resets")
    op.execute("DROP TABLE throttles")
    op.execute("ALTER TABLE sessions DROP COLUMN user_agent, DROP COLUMN address")

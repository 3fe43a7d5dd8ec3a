"""Users, sessions and revoked token ids."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE users (
            id                  uuid PRIMARY KEY,
            username            text NOT NULL CONSTRAINT users_username_key UNIQUE,
            email               text,
            email_verified      boolean NOT NULL DEFAULT false,
            password_hash       text NOT NULL,
            password_changed_at timestamptz NOT NULL,
            roles               text[] NOT NULL DEFAULT '{}',
            created_at          timestamptz NOT NULL,
            disabled_at         timestamptz
        )
    """)
    # A refresh updates `generation` and `rotated_at` in place: neither is indexed, and the free tenth of each page
    # holds the new version, so Postgres writes no index entry (HOT).
    op.execute("""
        CREATE TABLE sessions (
            id                  uuid PRIMARY KEY,
            user_id             uuid NOT NULL REFERENCES users (id) ON DELETE CASCADE,
            client_id           text NOT NULL,
            scope               text[] NOT NULL,
            amr                 text[] NOT NULL,
            authenticated_at    timestamptz NOT NULL,
            password_changed_at timestamptz NOT NULL,
            generation          integer NOT NULL DEFAULT 0,
            rotated_at          timestamptz NOT NULL,
            expires_at          timestamptz NOT NULL,
            revoked_at          timestamptz
        ) WITH (fillfactor = 90)
    """)
    op.execute("CREATE INDEX sessions_user_id_idx ON sessions (user_id)")
    op.execute("CREATE INDEX sessions_expires_at_idx ON sessions (expires_at)")
    op.execute("""
        CREATE TABLE revoked_tokens (
            jti        text PRIMARY KEY,
            reason     text NOT NULL,
            revoked_at timestamptz NOT NULL,
            expires_at timestamptz NOT NULL
        )
    """)
    op.execute("CREATE INDEX revoked_tokens_expires_at_idx ON revoked_tokens (expires_at)")


def downgrade() -> None:
    op.execute("DROP TABLE revoked_tokens")
    op.execute("DROP TABLE sessions")
    op.execute("DROP TABLE users")

"""Clients: the programs that ask for tokens, and the tokens they got for themselves."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # An empty audience and no lifetime mean the installation's settings. The built-in `first-party` is not in here.
    op.execute("""
        CREATE TABLE clients (
            client_id                  text PRIMARY KEY,
            grants                     text[] NOT NULL,
            scopes                     text[] NOT NULL,
            audience                   text[] NOT NULL,
            first_party                boolean NOT NULL,
            access_lifetime            interval,
            secret_digest              bytea NOT NULL,
            secret_changed_at          timestamptz NOT NULL,
            previous_secret_digest     bytea,
            previous_secret_expires_at timestamptz,
            created_at                 timestamptz NOT NULL,
            disabled_at                timestamptz
        )
    """)
    # Tokens of client_credentials belong to no session. A row lives as long as its token, so that disabling a client
    # can revoke them.
    op.execute("""
        CREATE TABLE client_tokens (
            jti          text PRIMARY KEY,
            client_id    text NOT NULL REFERENCES clients (client_id) ON DELETE CASCADE,
            status_index bigint NOT NULL DEFAULT next_status_index(),
            expires_at   timestamptz NOT NULL
        )
    """)
    op.execute("CREATE INDEX client_tokens_client_id_idx ON client_tokens (client_id)")
    op.execute("CREATE INDEX client_tokens_expires_at_idx ON client_tokens (expires_at)")


def downgrade() -> None:
    op.execute("DROP TABLE client_tokens")
    op.execute("DROP TABLE clients")

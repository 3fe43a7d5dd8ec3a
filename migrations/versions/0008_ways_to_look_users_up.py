"""Ways to look users and sessions up, built while the service goes on. Interrupted, this can be run again."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_INDEXES = {
    "users_username_prefix_idx": "users (username text_pattern_ops)",
    "users_email_prefix_idx": "users (lower(email) text_pattern_ops)",
    "users_administrators_idx": "users (id) WHERE 'admin' = ANY (roles)",
    "sessions_client_id_idx": "sessions (client_id) WHERE client_id <> 'first-party'",
}


def upgrade() -> None:
    # It waits for every transaction that is under way, a backup's too, and keeps nobody else waiting meanwhile.
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = 0")
        op.execute("SET statement_timeout = 0")
        for name, definition in _INDEXES.items():
            # What an interrupted run left is not valid.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {definition}")
        op.execute("SET lock_timeout = '5s'")
        op.execute("SET statement_timeout = '300s'")


def downgrade() -> None:
    for name in _INDEXES:
        op.execute(f"DROP INDEX IF EXISTS {name}")

"""Sessions from before there were status lists get their index, while the service goes on."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Each statement on its own: no refresh waits for longer than a batch takes. Interrupted, it can be run again.
    with op.get_context().autocommit_block():
        execute = op.get_bind().exec_driver_sql
        # A batch waits for nobody, so it cannot be in a deadlock with whoever ends several sessions.
        while execute("""
            UPDATE sessions SET status_index = next_status_index() WHERE id = ANY (ARRAY(
                SELECT id FROM sessions WHERE status_index IS NULL LIMIT 10000 FOR UPDATE SKIP LOCKED
            ))
        """).rowcount:
            pass
        execute("UPDATE sessions SET status_index = next_status_index() WHERE status_index IS NULL")
        # SET NOT NULL believes a constraint that holds already, and reads nothing while the table is locked.
        execute("ALTER TABLE sessions DROP CONSTRAINT IF EXISTS sessions_have_index")
        execute("ALTER TABLE sessions ADD CONSTRAINT sessions_have_index CHECK (status_index IS NOT NULL) NOT VALID")
        execute("ALTER TABLE sessions VALIDATE CONSTRAINT sessions_have_index")
        execute("ALTER TABLE sessions ALTER COLUMN status_index SET NOT NULL")
        execute("ALTER TABLE sessions DROP CONSTRAINT sessions_have_index")


def downgrade() -> None:
    op.execute("ALTER TABLE sessions ALTER COLUMN status_index DROP NOT NULL")

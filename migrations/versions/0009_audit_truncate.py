"""The record of what happened cannot be emptied by a slip: TRUNCATE asks no trigger that looks at rows."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# A trigger for statements holds for the table it is on and for no other: each partition needs its own. The service
# gives it to those that it makes.
_TABLES = """
    SELECT 'audit_events'::regclass
     UNION ALL
    SELECT inhrelid FROM pg_inherits WHERE inhparent = 'audit_events'::regclass
"""


def upgrade() -> None:
    op.execute("""
        CREATE FUNCTION refuse_audit_truncate() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION 'audit_events is append-only' USING ERRCODE = 'restrict_violation';
        END
        $$
    """)
    op.execute(f"""
        DO $$
        DECLARE
            place regclass;
        BEGIN
            FOR place IN {_TABLES} LOOP
                EXECUTE format('CREATE TRIGGER audit_events_no_truncate BEFORE TRUNCATE ON %s'
                               ' FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_truncate()', place);
            END LOOP;
        END
        $$
    """)


def downgrade() -> None:
    op.execute("DROP FUNCTION refuse_audit_truncate CASCADE")

"""What happened, append-only: one row an event, chained by hashes shortly after it was committed."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE SEQUENCE audit_events_id_seq")
    # Partitioned by time, so that what is too old goes by dropping a table. The service adds a partition each month;
    # the default one takes what no partition is there for, so that no act fails because of its record.
    op.execute("""
        CREATE TABLE audit_events (
            id            bigint NOT NULL DEFAULT nextval('audit_events_id_seq'),
            occurred_at   timestamptz NOT NULL,
            event         text NOT NULL,
            outcome       text NOT NULL,
            reason        text,
            actor_kind    text NOT NULL,
            actor_id      text,
            subject_kind  text,
            subject_id    text,
            client_id     text,
            session_id    uuid,
            address       text,
            user_agent    text,
            request_id    text,
            details       jsonb NOT NULL DEFAULT '{}',
            position      bigint,
            previous_hash bytea,
            hash          bytea,
            PRIMARY KEY (id, occurred_at)
        ) PARTITION BY RANGE (occurred_at)
    """)
    op.execute("CREATE TABLE audit_events_default PARTITION OF audit_events DEFAULT")
    op.execute("""
        DO $$
        DECLARE
            month timestamptz := date_trunc('month', now() AT TIME ZONE 'UTC') AT TIME ZONE 'UTC';
            following timestamptz;
        BEGIN
            FOR _ IN 1..2 LOOP
                following := (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC';
                EXECUTE format('CREATE TABLE audit_events_%s PARTITION OF audit_events FOR VALUES FROM (%L) TO (%L)',
                               to_char(month AT TIME ZONE 'UTC', 'YYYY_MM'), month, following);
                month := following;
            END LOOP;
        END
        $$
    """)
    op.execute("CREATE INDEX audit_events_subject_id_idx ON audit_events (subject_id, id)")
    op.execute("CREATE INDEX audit_events_actor_id_idx ON audit_events (actor_id, id)")
    op.execute("CREATE INDEX audit_events_event_idx ON audit_events (event, id)")
    op.execute("CREATE INDEX audit_events_position_idx ON audit_events (position)")
    op.execute("CREATE INDEX audit_events_unchained_idx ON audit_events (id) WHERE position IS NULL")
    # Where the chain ends, and where what was dropped ended. One row, locked by whoever lengthens the chain.
    op.execute("""
        CREATE TABLE audit_chain (
            only_row         boolean PRIMARY KEY DEFAULT true CHECK (only_row),
            position         bigint NOT NULL DEFAULT 0,
            hash             bytea NOT NULL DEFAULT decode(repeat('00', 32), 'hex'),
            dropped_position bigint NOT NULL DEFAULT 0,
            dropped_hash     bytea NOT NULL DEFAULT decode(repeat('00', 32), 'hex')
        )
    """)
    op.execute("INSERT INTO audit_chain DEFAULT VALUES")
    # Against slips, not against whoever owns the database: the chain is what shows those.
    op.execute("""
        CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'UPDATE' AND OLD.position IS NULL
               AND (to_jsonb(NEW) - '{position,previous_hash,hash}'::text[])
                 = (to_jsonb(OLD) - '{position,previous_hash,hash}'::text[]) THEN
                RETURN NEW;
            END IF;
            RAISE EXCEPTION 'audit_events is append-only' USING ERRCODE = 'restrict_violation';
        END
        $$
    """)
    op.execute("""
        CREATE TRIGGER audit_events_append_only BEFORE UPDATE OR DELETE ON audit_events
        FOR EACH ROW EXECUTE FUNCTION refuse_audit_change()
    """)


def downgrade() -> None:
    op.execute("DROP TABLE audit_events")
    op.execute("DROP SEQUENCE audit_events_id_seq")
    op.execute("DROP FUNCTION refuse_audit_change")
    op.execute("DROP TABLE audit_chain")

"""Roles give scopes. The built-in role `admin` is not in the table: what it gives is in the code."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE roles (
            name       text PRIMARY KEY,
            scopes     text[] NOT NULL,
            created_at timestamptz NOT NULL
        )
    """)
    # Roles that users already have exist from now on, giving nothing yet.
    op.execute("""
        INSERT INTO roles (name, scopes, created_at)
        SELECT DISTINCT name, '{}'::text[], now() FROM users, unnest(roles) AS name WHERE name <> 'admin'
    """)


def downgrade() -> None:
    op.execute("DROP TABLE roles")

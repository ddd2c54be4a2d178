"""What Alembic runs to migrate: on the connection that the caller has, in its transaction."""

from alembic import context

from optimizer.service.schema import metadata

if __name__ == "env_py":  # as Alembic names it; nothing happens when it is imported
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=metadata,
        render_as_batch=True,  # SQLite can't alter a column; Alembic copies the table
        transactional_ddl=False,  # the caller's transaction holds it all
    )
    context.run_migrations()

"""Alembic's migrations of the service's database, oldest first by their numbers."""

"""Disturb a server while it is measured, and say how long it took to recover and what it lost."""

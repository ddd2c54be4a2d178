"""Architectures: networks as data, and the search for one that is fast and accurate."""

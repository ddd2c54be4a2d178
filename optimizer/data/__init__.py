"""Samples to train on, to choose by and to report: read, hashed and split without overlap."""

"""Open-loop load tests of an inference server, with a verdict against an SLO."""

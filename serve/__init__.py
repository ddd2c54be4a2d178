"""Inference server: Open Inference Protocol over REST and gRPC, batching that knows the SLO."""

VERSION = "0.1.0"

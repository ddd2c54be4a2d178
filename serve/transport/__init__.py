"""Transports: REST and gRPC in front of `serve.service`. Nothing below knows of them."""

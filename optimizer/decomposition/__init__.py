"""Decomposition of layers: ranks, factors, and the chains of smaller layers made of them."""

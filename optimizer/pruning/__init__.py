"""Pruning: which parts of a network can go together, which should, and taking them out.

It works on torch modules and knows neither techniques nor the search.
"""

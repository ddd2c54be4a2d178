"""The search: which recipes to try, in which order. It sees names and numbers, no model."""

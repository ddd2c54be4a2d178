"""Search for the cheapest variant of a trained model that keeps its service-level objective."""

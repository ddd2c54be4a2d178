"""What a cluster needs to know of an SLO: rendered resources, and how much of everything."""

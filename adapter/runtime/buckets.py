"""Bounds of the duration histogram that the model process fills and the entrypoint serves."""

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds in seconds; Prometheus's defaults end at 10 s, where some model answers begin."""

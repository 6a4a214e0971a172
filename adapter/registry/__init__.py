"""Snapshots in an OCI registry: a client of the distribution protocol, and snapshots as artifacts beside an image."""

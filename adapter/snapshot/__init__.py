"""Saved state that a replica can start from: process snapshots (CRIU) and weight snapshots (safetensors)."""

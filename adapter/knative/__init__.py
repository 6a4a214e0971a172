"""Knative Serving: what a Service is given when it is written, and how its Revisions are kept warm."""

"""Talking to a Kubernetes cluster: its API, watches, elections, certificates; and its objects as our values.

Knows nothing of what is decided with them: that is `adapter.policy`'s, and acting is `adapter.controller`'s,
`adapter.agent`'s and `adapter.hosts.kubernetes`'s.
"""

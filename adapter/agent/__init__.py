"""The agent: one on each node of a cluster. It sees what the node has and who held it, and tells the ledger.

It decides nothing about functions, and no request goes through it: down, it is missed by nobody who serves.
"""

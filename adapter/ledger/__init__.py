"""The ledger: append-only facts about replicas, and the only owner of them."""

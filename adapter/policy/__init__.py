"""Decisions: pure functions of values, the clock passed in. Acting on them happens elsewhere."""

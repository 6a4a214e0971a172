"""Measures the bars that gpufn sets itself: see `benchmarks.__main__`."""

"""Benchmarks on real servers; each writes what it measured under ``eval/results/``."""

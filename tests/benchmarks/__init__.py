"""Benchmarks: they print figures and assert nothing; the product never imports them."""

"""Tests: contracts of each part, and of the whole through its real commands."""

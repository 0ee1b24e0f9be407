"""Tests of bgtasks.core."""

"""Tests of bgtasks.monitoring."""

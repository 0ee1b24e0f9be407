"""Tests of bgtasks.handoff."""

"""Tests of bgtasks.rehearsal."""

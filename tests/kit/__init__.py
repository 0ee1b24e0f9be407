"""A project that tests itself with the testing kit; tests/test_kit.py runs its tests in every way."""

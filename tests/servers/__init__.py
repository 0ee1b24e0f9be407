"""The site that the real servers serve in tests/test_servers.py."""

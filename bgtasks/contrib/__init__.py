"""Bridges to other libraries. Each module needs the one it is named after, and nothing else does."""

"""``manage.py bgtasks``."""

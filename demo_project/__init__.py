"""Guestlist: a small sign-up site that shows what bgtasks is for."""

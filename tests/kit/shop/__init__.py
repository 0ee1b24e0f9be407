"""The shop: one model, one view that spawns, sync and async."""

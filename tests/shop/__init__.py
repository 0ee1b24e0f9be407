"""A project whose call sites are the same whatever runs its tasks: SHOP_ENGINE decides. Needs Django 6.0."""

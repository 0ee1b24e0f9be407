"""The guest list in Django's admin. The page "Background tasks" beside it comes with bgtasks."""

from django.contrib import admin

from .models import Member

admin.site.register(
    Member,
    list_display=("name", "email", "how", "joined_at"),
    list_filter=("how",),
    search_fields=("name", "email"),
)

from django.urls import path

from tests.servers import views

urlpatterns = [
    path("", views.identify),
    path("spawn/", views.spawn),
    path("aspawn/", views.aspawn),
    path("busy/", views.busy),
    path("rows/", views.rows),
    path("slow/", views.slow),
]

"""The addresses of the demo site."""

from django.contrib import admin
from django.urls import path

from . import views

urlpatterns = [
    path("", views.dashboard, name="dashboard"),
    path("sign-up/", views.sign_up, name="sign-up"),
    path("sign-up/async/", views.asign_up, name="sign-up-async"),
    path("members/", views.members, name="members"),
    path("bursts/", views.start_burst, name="start-burst"),
    path("bursts/<uuid:key>/", views.burst, name="burst"),
    path("live/", views.live, name="live"),
    path("probe/", views.probe, name="probe"),
    path("admin/", admin.site.urls),
]

"""The views of the shop, and their tasks."""

from django.http import HttpRequest, HttpResponse
from django.urls import path

import bgtasks
from tests.kit.shop.models import Order


def confirm(pk: int) -> None:
    Order.objects.filter(pk=pk).update(confirmed=True)


async def aconfirm(pk: int) -> None:
    await Order.objects.filter(pk=pk).aupdate(confirmed=True)


def order(request: HttpRequest) -> HttpResponse:
    made = Order.objects.create(reference=request.GET["reference"])
    bgtasks.spawn_on_commit("confirm", confirm, made.pk)
    return HttpResponse(made.pk)


async def aorder(request: HttpRequest) -> HttpResponse:
    made = await Order.objects.acreate(reference=request.GET["reference"])
    bgtasks.spawn("confirm", aconfirm, made.pk)
    return HttpResponse(made.pk)


urlpatterns = [path("order", order), path("aorder", aorder)]

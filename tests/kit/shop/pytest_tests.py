"""The shop's tests with the fixtures of the pytest plugin."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import SyncToAsync
from django.db import connections
from django.test import AsyncClient, Client
from pytest_django.live_server_helper import LiveServer

import bgtasks
from bgtasks.testing import Captured
from tests.gate import wait_until
from tests.kit.shop.models import Order
from tests.kit.shop.urls import aconfirm, confirm


def bgtasks_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bgtasks")]


@pytest.mark.django_db
def test_inline(
    client: Client, bgtasks_inline: None, django_capture_on_commit_callbacks: Callable[..., Any]
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        client.get("/order?reference=a")

    assert Order.objects.get().confirmed


@pytest.mark.django_db
def test_captured(
    client: Client, bgtasks_captured: Captured, django_capture_on_commit_callbacks: Callable[..., Any]
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        response = client.get("/order?reference=a")

    bgtasks_captured.assert_spawned("confirm", int(response.content))


@pytest.fixture
def async_orm() -> Iterator[None]:
    """Close what the ORM calls of an asyncio test leave open on asgiref's thread: that is no slot's."""
    yield

    SyncToAsync.single_thread_executor.submit(connections.close_all).result(30)


@pytest.fixture
def no_thread_of_bgtasks() -> Iterator[None]:
    yield

    wait_until(lambda: not bgtasks_threads())


def test_drained(
    no_thread_of_bgtasks: None, transactional_db: None, client: Client, bgtasks_drained: None
) -> None:
    client.get("/order?reference=a")

    assert bgtasks.drain(30)
    assert Order.objects.get().confirmed


@pytest.mark.django_db(transaction=True)
def test_drained_ends_after_the_test(no_thread_of_bgtasks: None, bgtasks_drained: None) -> None:
    bgtasks.spawn("confirm", confirm, 0)


def test_live_server(
    no_thread_of_bgtasks: None, live_server: LiveServer, client: Client, bgtasks_drained: None
) -> None:
    client.get("/order?reference=a")


@pytest.mark.asyncio
@pytest.mark.django_db(transaction=True)
async def test_inline_in_asyncio(async_orm: None, bgtasks_inline: None, async_client: AsyncClient) -> None:
    await async_client.get("/aorder?reference=a")

    assert (await Order.objects.aget()).confirmed


@pytest.mark.asyncio
@pytest.mark.django_db(transaction=True)
async def test_drained_in_asyncio(async_orm: None, no_thread_of_bgtasks: None, bgtasks_drained: None) -> None:
    order = await Order.objects.acreate(reference="a")
    bgtasks.spawn("confirm", aconfirm, order.pk)

    assert await bgtasks.adrain(30)
    assert (await Order.objects.aget()).confirmed

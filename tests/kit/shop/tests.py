"""The shop's tests, for any runner."""

import urllib.request

from django.db import connections
from django.db.backends.sqlite3.base import DatabaseWrapper as SQLite
from django.test import LiveServerTestCase, TestCase, TransactionTestCase

import bgtasks
from bgtasks import testing
from tests.kit.shop.models import Order
from tests.kit.shop.urls import confirm


def is_in_memory() -> bool:
    """Tell whether the database is one whose second writer fails at once, and does not wait for the first."""
    database = connections["default"]
    return isinstance(database, SQLite) and database.is_in_memory_db()


class Inline(TestCase):
    @testing.inline()
    def test_sync_view(self) -> None:
        with self.captureOnCommitCallbacks(execute=True):
            self.client.get("/order?reference=a")

        assert Order.objects.get().confirmed

    @testing.inline()
    async def test_async_view(self) -> None:
        await self.async_client.get("/aorder?reference=a")

        assert (await Order.objects.aget()).confirmed

    @testing.inline()
    def test_async_view_with_the_sync_client(self) -> None:
        self.client.get("/aorder?reference=a")

        assert Order.objects.get().confirmed


@testing.captured(attr_name="tasks")
class Captured(TestCase):
    tasks: testing.Captured

    def test_view(self) -> None:
        with self.captureOnCommitCallbacks(execute=True):
            response = self.client.get("/order?reference=a")

        self.tasks.assert_spawned("confirm", int(response.content))
        self.tasks.run_all()
        assert Order.objects.get().confirmed


class Drained(TransactionTestCase):
    def test_view(self) -> None:
        with testing.drained():
            self.client.get("/order?reference=a")
            if is_in_memory():
                bgtasks.drain(30)
            self.client.get("/aorder?reference=b")

        assert [order.confirmed for order in Order.objects.all()] == [True, True]

    def test_nothing_is_left_of_another_test(self) -> None:
        assert not Order.objects.exists()


class Live(LiveServerTestCase):
    @testing.drained()
    def test_view(self) -> None:
        urllib.request.urlopen(f"{self.live_server_url}/order?reference=a").close()

        bgtasks.drain(30)
        assert Order.objects.get().confirmed


class Plain(TransactionTestCase):
    """Without the kit: the slots keep their connections, and their database is dropped all the same."""

    def test_slots_keep_connections(self) -> None:
        order = Order.objects.create(reference="a")
        bgtasks.spawn("confirm", confirm, order.pk)

        assert bgtasks.drain(30)
        assert Order.objects.get().confirmed

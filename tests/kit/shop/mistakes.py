"""Tests that fail, each by a mistake that the kit has a hint for. `tests/test_kit.py` runs them."""

import pytest
from django.db import OperationalError

import bgtasks
from bgtasks.testing import Captured, Drained
from tests.kit.shop.models import Order


def confirm(pk: int) -> None:
    order = Order.objects.get(pk=pk)
    order.confirmed = True
    order.save()


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.django_db
def test_captured_without_a_commit(bgtasks_captured: Captured) -> None:
    bgtasks.spawn_on_commit("confirm", confirm, 7)

    bgtasks_captured.assert_spawned("confirm", 7)


@pytest.mark.django_db
def test_drained_in_a_transaction(bgtasks_drained: Drained) -> None:
    order = Order.objects.create(reference="a")
    bgtasks.spawn("confirm", confirm, order.pk)

    assert bgtasks.drain(30)
    bgtasks_drained.allow_failures = True
    order.refresh_from_db()
    assert order.confirmed


@pytest.mark.django_db
def test_task_in_a_transaction(bgtasks_drained: Drained) -> None:
    bgtasks.spawn("confirm", confirm, Order.objects.create(reference="a").pk)


def test_task_that_fails(bgtasks_drained: Drained) -> None:
    bgtasks.spawn("fails", fail)


def test_failure_that_is_allowed(bgtasks_drained: Drained) -> None:
    bgtasks_drained.allow_failures = True
    bgtasks.spawn("fails", fail)

    assert bgtasks.drain(30)
    assert [each.name for each in bgtasks_drained.failures] == ["fails"]


@pytest.mark.django_db(transaction=True)
def test_second_writer(bgtasks_drained: Drained) -> None:
    Order.objects.create(reference="a")
    raise OperationalError("database table is locked: shop_order")  # as SQLite in memory does, at times

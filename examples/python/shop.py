"""A small shop. What it does is simulated; how it is instrumented is real.

It knows OpenTelemetry's API and the standard library's logging, but no SDK and no exporter: where the telemetry goes
is up to whoever starts it. That is `sdk_exporter.py`, or `otlp_receiver.py`, or `opentelemetry-instrument`.
"""

import logging
import random
import time

from opentelemetry import trace
from opentelemetry.trace import Link, SpanContext, SpanKind, Tracer, TracerProvider

ORDERS = 20
BANK_IS_DOWN_AT = (3, 13)  # orders
CUSTOMERS = ("c-1001", "c-1002", "c-1003", "c-1004")
DATABASE = {"db.system.name": "postgresql", "db.operation.name": "SELECT"}
PRODUCTS = ("teapot", "kettle", "cup", "saucer")

shop_log = logging.getLogger("shop")
payments_log = logging.getLogger("payments")
chance = random.Random(7)  # the same orders each time


class BankError(Exception):
    """The bank did not take the money."""


def main(shop_provider: TracerProvider | None = None, payments_provider: TracerProvider | None = None) -> None:
    """Take some orders and ship them. The default providers are what `opentelemetry-instrument` has set."""
    shop = trace.get_tracer("shop", "1.0", shop_provider)
    payments = trace.get_tracer("payments", "1.0", payments_provider)
    placed = []
    for number in range(1, ORDERS + 1):
        try:
            placed.append(place_order(number, shop, payments))
        except BankError as error:
            shop_log.warning("order %d failed: %s", number, error)
    ship(placed, shop)
    shop_log.info("%d orders placed, %d failed", len(placed), ORDERS - len(placed))


def place_order(number: int, shop: Tracer, payments: Tracer) -> SpanContext:
    """Handle one request: a span of the request, with a child for each step."""
    customer, product = chance.choice(CUSTOMERS), chance.choice(PRODUCTS)
    request: dict[str, str | int] = {
        "http.request.method": "POST",
        "http.route": "/orders",
        "shop.customer.id": customer,
        "shop.order.number": number,
    }
    # A span is current inside its `with`: spans that start there become its children, log records bear its ids, and
    # an exception that leaves it is recorded as an event and turns its status to error.
    with shop.start_as_current_span("POST /orders", kind=SpanKind.SERVER, attributes=request) as span:
        with shop.start_as_current_span("SELECT stock", kind=SpanKind.CLIENT, attributes=DATABASE):
            work(0.002)
        span.add_event("stock reserved", {"shop.product": product})
        with shop.start_as_current_span("POST /charge", kind=SpanKind.CLIENT):
            charge(number, payments)
        shop_log.info("order %d placed: a %s for %s", number, product, customer)
        return span.get_span_context()


def charge(number: int, payments: Tracer) -> None:
    """Take the money, unless the bank does not answer."""
    with payments.start_as_current_span("POST /charge", kind=SpanKind.SERVER):
        work(0.004)
        if number in BANK_IS_DOWN_AT:
            payments_log.error("no answer from the bank for order %d", number)
            raise BankError("bank timed out")


def ship(orders: list[SpanContext], shop: Tracer) -> None:
    """Ship all orders at once. The batch is a trace of its own, which links to the traces of the orders."""
    links = [Link(order) for order in orders]
    with shop.start_as_current_span("ship orders", kind=SpanKind.CONSUMER, links=links):
        work(0.02)


def work(seconds: float) -> None:
    """Pass some time: mostly about as long as said, sometimes much longer."""
    time.sleep(chance.expovariate(1 / seconds))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    main()

package shop;

import static io.opentelemetry.api.common.AttributeKey.booleanKey;
import static io.opentelemetry.api.common.AttributeKey.doubleKey;
import static io.opentelemetry.api.common.AttributeKey.longKey;
import static io.opentelemetry.api.common.AttributeKey.stringArrayKey;
import static io.opentelemetry.api.common.AttributeKey.stringKey;

import io.opentelemetry.api.common.Attributes;
import io.opentelemetry.api.trace.Span;
import io.opentelemetry.api.trace.SpanKind;
import io.opentelemetry.api.trace.StatusCode;
import io.opentelemetry.api.trace.Tracer;
import io.opentelemetry.context.Scope;
import io.opentelemetry.instrumentation.logback.appender.v1_0.OpenTelemetryAppender;
import io.opentelemetry.sdk.OpenTelemetrySdk;
import io.opentelemetry.sdk.autoconfigure.AutoConfiguredOpenTelemetrySdk;
import java.util.List;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * A small shop: takes three orders, of which the bank refuses one, and lets a chat model write the confirmations. What
 * it does is simulated; how it is instrumented is real.
 */
public final class Shop {
  private static final int ORDERS = 3;
  private static final int BANK_IS_DOWN_AT = 2;
  private static final Logger log = LoggerFactory.getLogger(Shop.class);

  private final Tracer tracer;

  private Shop(Tracer tracer) {
    this.tracer = tracer;
  }

  public static void main(String[] args) throws InterruptedException {
    // Where to send to, and by which protocol, is all in OTEL_* variables. Closing sends what is still buffered.
    try (OpenTelemetrySdk sdk = AutoConfiguredOpenTelemetrySdk.initialize().getOpenTelemetrySdk()) {
      OpenTelemetryAppender.install(sdk); // what is logged goes along
      Shop shop = new Shop(sdk.getTracer("shop", "1.0"));
      for (int number = 1; number <= ORDERS; number++) {
        try {
          shop.placeOrder(number);
        } catch (BankException e) {
          // The customer's client has seen a 500.
        }
      }
    }
  }

  /** Handles one request: a span of the request, with a child for each step. What is logged meanwhile bears its ids. */
  private void placeOrder(int number) throws BankException, InterruptedException {
    Span span = tracer.spanBuilder("POST /orders").setSpanKind(SpanKind.SERVER)
        .setAttribute("http.request.method", "POST")
        .setAttribute("http.route", "/orders")
        .setAttribute(longKey("shop.order.number"), number)
        .setAttribute(booleanKey("shop.order.gift"), number == 1)
        .startSpan();
    try (Scope ignored = span.makeCurrent()) {
      fulfil(number, span);
    } finally {
      span.end();
    }
  }

  private void fulfil(int number, Span span) throws BankException, InterruptedException {
    try {
      selectStock();
      span.addEvent("stock reserved", Attributes.of(stringKey("shop.product"), "teapot"));
      charge(number);
      confirm();
      log.atInfo().addKeyValue("order", number).log("order {} placed", number);
    } catch (BankException e) {
      log.atError().addKeyValue("order", number).log("order {} failed: {}", number, e.getMessage());
      fail(span, e);
      throw e;
    }
  }

  private void selectStock() throws InterruptedException {
    Span span = tracer.spanBuilder("SELECT stock").setSpanKind(SpanKind.CLIENT)
        .setAttribute("db.system.name", "postgresql")
        .setAttribute("db.operation.name", "SELECT")
        .startSpan();
    Thread.sleep(2);
    span.end();
  }

  private void charge(int number) throws BankException, InterruptedException {
    Span span = tracer.spanBuilder("charge").startSpan();
    try {
      Thread.sleep(4);
      if (number == BANK_IS_DOWN_AT) {
        throw new BankException("bank timed out");
      }
    } catch (BankException e) {
      fail(span, e);
      throw e;
    } finally {
      span.end();
    }
  }

  /** Calls a chat model; the attributes are those of OpenTelemetry's GenAI conventions. */
  private void confirm() throws InterruptedException {
    Span span = tracer.spanBuilder("chat gpt-5-mini").setSpanKind(SpanKind.CLIENT)
        .setAttribute("gen_ai.operation.name", "chat")
        .setAttribute("gen_ai.provider.name", "openai")
        .setAttribute("gen_ai.request.model", "gpt-5-mini")
        .setAttribute(doubleKey("gen_ai.request.temperature"), 0.2)
        .startSpan();
    Thread.sleep(10);
    span.setAttribute(stringArrayKey("gen_ai.response.finish_reasons"), List.of("stop"));
    span.setAttribute(longKey("gen_ai.usage.input_tokens"), 268);
    span.setAttribute(longKey("gen_ai.usage.output_tokens"), 28);
    span.end();
  }

  private static void fail(Span span, BankException e) {
    span.recordException(e);
    span.setStatus(StatusCode.ERROR, e.getMessage());
  }

  /** The bank did not take the money. */
  private static final class BankException extends Exception {
    BankException(String message) {
      super(message);
    }
  }
}

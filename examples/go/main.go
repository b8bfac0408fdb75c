// A small shop: takes three orders, of which the bank refuses one, and lets a chat model write the confirmations. What it
// does is simulated; how it is instrumented is real.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"go.opentelemetry.io/contrib/bridges/otelslog"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

const (
	orders       = 3
	bankIsDownAt = 2
)

var (
	tracer = otel.Tracer("shop", trace.WithInstrumentationVersion("1.0"))
	log    = otelslog.NewLogger("shop")
)

func main() {
	if err := run(context.Background()); err != nil {
		slog.Error("telemetry was lost", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	shutDown, err := setUp(ctx)
	if err != nil {
		return err
	}
	for number := 1; number <= orders; number++ {
		if err := placeOrder(ctx, number); err != nil {
			fmt.Printf("order %d: %v\n", number, err) // the customer's client sees a 500
		}
	}
	limited, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return shutDown(limited)
}

// placeOrder handles one request: a span of the request, with a child for each step. What is logged with its context
// bears its ids.
func placeOrder(ctx context.Context, number int) error {
	request := []attribute.KeyValue{
		attribute.String("http.request.method", "POST"),
		attribute.String("http.route", "/orders"),
		attribute.Int("shop.order.number", number),
		attribute.Bool("shop.order.gift", number == 1),
	}
	return inSpan(ctx, "POST /orders", trace.SpanKindServer, request, func(ctx context.Context) error {
		query := []attribute.KeyValue{
			attribute.String("db.system.name", "postgresql"),
			attribute.String("db.operation.name", "SELECT"),
		}
		if err := inSpan(ctx, "SELECT stock", trace.SpanKindClient, query, work(2*time.Millisecond)); err != nil {
			return err
		}
		product := trace.WithAttributes(attribute.String("shop.product", "teapot"))
		trace.SpanFromContext(ctx).AddEvent("stock reserved", product)
		if err := inSpan(ctx, "charge", trace.SpanKindInternal, nil, charge(number)); err != nil {
			log.ErrorContext(ctx, fmt.Sprintf("order %d failed: %v", number, err), "order", number)
			return err
		}
		if err := inSpan(ctx, "chat gpt-5-mini", trace.SpanKindClient, chat(), confirm); err != nil {
			return err
		}
		log.InfoContext(ctx, fmt.Sprintf("order %d placed", number), "order", number)
		return nil
	})
}

func charge(number int) func(context.Context) error {
	return func(context.Context) error {
		time.Sleep(4 * time.Millisecond)
		if number == bankIsDownAt {
			return errors.New("bank timed out")
		}
		return nil
	}
}

// chat is what is known before the model is called, as OpenTelemetry's GenAI conventions name it.
func chat() []attribute.KeyValue {
	return []attribute.KeyValue{
		attribute.String("gen_ai.operation.name", "chat"),
		attribute.String("gen_ai.provider.name", "openai"),
		attribute.String("gen_ai.request.model", "gpt-5-mini"),
		attribute.Float64("gen_ai.request.temperature", 0.2),
	}
}

// confirm calls the model, and records what is known then.
func confirm(ctx context.Context) error {
	time.Sleep(10 * time.Millisecond)
	trace.SpanFromContext(ctx).SetAttributes(
		attribute.StringSlice("gen_ai.response.finish_reasons", []string{"stop"}),
		attribute.Int("gen_ai.usage.input_tokens", 268),
		attribute.Int("gen_ai.usage.output_tokens", 28),
	)
	return nil
}

func work(duration time.Duration) func(context.Context) error {
	return func(context.Context) error {
		time.Sleep(duration)
		return nil
	}
}

// inSpan does some work in a span; an error is recorded, and turns the span's status to error.
func inSpan(
	ctx context.Context, name string, kind trace.SpanKind, attributes []attribute.KeyValue,
	work func(context.Context) error,
) error {
	ctx, span := tracer.Start(ctx, name, trace.WithSpanKind(kind), trace.WithAttributes(attributes...))
	defer span.End()
	err := work(ctx)
	if err != nil {
		span.RecordError(err)
		span.SetStatus(codes.Error, err.Error())
	}
	return err
}

// A small shop: takes three orders, of which the bank refuses one, and lets a chat model write the confirmations. What it
// does is simulated; how it is instrumented is real.

'use strict';

const { setTimeout: sleep } = require('node:timers/promises');
const { SpanKind, SpanStatusCode, trace } = require('@opentelemetry/api');
const log = require('pino')();

const tracer = trace.getTracer('shop', '1.0');
const ORDERS = 3;
const BANK_IS_DOWN_AT = 2;

async function main() {
  for (let number = 1; number <= ORDERS; number += 1) {
    await placeOrder(number).catch(() => {}); // the customer's client has seen a 500
  }
}

// Handle one request: a span of the request, with a child for each step. What is logged meanwhile bears its ids.
async function placeOrder(number) {
  const attributes = {
    'http.request.method': 'POST',
    'http.route': '/orders',
    'shop.order.number': number,
    'shop.order.gift': number === 1,
  };
  await inSpan('POST /orders', { kind: SpanKind.SERVER, attributes }, async (span) => {
    try {
      const select = { 'db.system.name': 'postgresql', 'db.operation.name': 'SELECT' };
      await inSpan('SELECT stock', { kind: SpanKind.CLIENT, attributes: select }, () => sleep(2));
      span.addEvent('stock reserved', { 'shop.product': 'teapot' });
      await inSpan('charge', {}, () => charge(number));
      await inSpan('chat gpt-5-mini', { kind: SpanKind.CLIENT, attributes: request() }, confirm);
      log.info({ order: number }, `order ${number} placed`);
    } catch (error) {
      log.error({ order: number }, `order ${number} failed: ${error.message}`);
      throw error;
    }
  });
}

async function charge(number) {
  await sleep(4);
  if (number === BANK_IS_DOWN_AT) throw new Error('bank timed out');
}

// What is known before the model is called, and what after: OpenTelemetry's GenAI conventions.
const request = () => ({
  'gen_ai.operation.name': 'chat',
  'gen_ai.provider.name': 'openai',
  'gen_ai.request.model': 'gpt-5-mini',
  'gen_ai.request.temperature': 0.2,
});

async function confirm(span) {
  await sleep(10);
  span.setAttributes({
    'gen_ai.response.finish_reasons': ['stop'],
    'gen_ai.usage.input_tokens': 268,
    'gen_ai.usage.output_tokens': 28,
  });
}

// Run work in a span that is current meanwhile; an error that leaves it is recorded, and turns its status to error.
function inSpan(name, options, work) {
  return tracer.startActiveSpan(name, options, async (span) => {
    try {
      return await work(span);
    } catch (error) {
      span.recordException(error);
      span.setStatus({ code: SpanStatusCode.ERROR, message: error.message });
      throw error;
    } finally {
      span.end();
    }
  });
}

main();

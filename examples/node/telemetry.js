// Sets OpenTelemetry up before the app is loaded (`node --require`). Where to send to, and by which protocol, is all in
// OTEL_* variables; the app itself knows OpenTelemetry's API and pino, and nothing of this file.

'use strict';

const { NodeSDK } = require('@opentelemetry/sdk-node');
const { PinoInstrumentation } = require('@opentelemetry/instrumentation-pino');

const sdk = new NodeSDK({ instrumentations: [new PinoInstrumentation()] });
sdk.start();

// What is still buffered when the app has nothing left to do, or is told to stop, goes out before the process ends.
const flush = () => sdk.shutdown().catch((error) => console.error('telemetry was lost:', error));
process.once('beforeExit', flush);
process.once('SIGTERM', () => flush().finally(() => process.exit(0)));

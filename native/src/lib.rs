//! The native core: OTLP bytes and a compiled mapping to finished binary COPY rows, and rows merged into one COPY.
//!
//! `otel_pg_exporter/transcode/wire.py` is the reference, and says what everything means; this crate does the same
//! for what well-behaved senders send, byte for byte. Whatever is odd about the wire format itself (broken bytes,
//! text that is not UTF-8, a message in two pieces, too deep nesting), or might be too much, ends in
//! [`wire::Unusual`]: the caller then leaves the whole request to the reference. So this code never repairs bytes, and nothing is decided twice.
//!
//! No `unsafe`, no panic whatever the bytes are, and no recursion deeper than protobuf's limit.

pub mod batch;
pub mod copy;
pub mod facts;
pub mod fields;
pub mod json;
pub mod merge;
pub mod messages;
pub mod numbers;
pub mod packed;
pub mod plan;
#[cfg(feature = "python")]
mod python;
pub mod request;
pub mod rows;
pub mod traces;
pub mod values;
pub mod wire;

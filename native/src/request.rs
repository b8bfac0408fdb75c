//! A request, walked from its resources down to its items.

use blake2::Blake2b;
use blake2::digest::Digest;
use blake2::digest::consts::U16;

use crate::batch::{Batch, Hold, Receipt, Result};
use crate::messages::{LogRecord, Resource, Scope, Span};
use crate::plan::{Plan, Signal};
use crate::rows::{Builder, EncodedResource, Shared};
use crate::wire::{Content, Fields, Result as Read, Unusual, once, text};

// Traces and logs have the same numbers: request.resource_*, resource_*.scope_*, scope_*.spans or .log_records.
const RESOURCES: u32 = 1;
const SCOPES: u32 = 2;
const ITEMS: u32 = 2;

/// Fields of one item, resource or scope, at all levels. Each can take 200 bytes here, which nobody has reserved; so
/// what has more is left to the reference, which decodes one such at a time.
const MOST_FIELDS: usize = 8192;

const FIELDS_SEEN: usize = 20;
const GROWTH_OF_TEXT: usize = 24; // a byte's escape of six characters, each of them four bytes wide in Python

/// What the reference refuses for its size; see `otel_pg_exporter/transcode/limits.py`.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub parts: usize,
    pub fields: usize,
    pub text_bytes: usize,
}

/// Make rows of an OTLP export request.
///
/// Each field of the request's frame costs one of `limits.parts`. Whatever might exceed a limit is left to the
/// reference, which reckons exactly. `hold` hears of the growth; the batch's final size is the caller's to tell.
pub fn transcode(plan: &Plan, body: &[u8], receipt: &Receipt, limits: Limits, hold: Hold<'_>) -> Result<Batch> {
    let mut tell = |size: usize| hold(body.len() + size);
    let builder = Builder::new(plan, receipt, body.len() + body.len() / 4, &mut tell);
    let mut walk = Walk {
        signal: plan.signal,
        limits,
        parts: limits.parts,
        index: 0,
        span: Span::default(),
        record: LogRecord::default(),
        builder,
    };
    let mut fields = Fields::new(body);
    while let Some(field) = fields.next(&mut walk.parts)? {
        match field {
            (RESOURCES, Content::Delimited(message)) => walk.resource(message)?,
            (RESOURCES, _) => return Err(Unusual.into()),
            _ => {}
        }
    }
    Ok(walk.builder.finish(body.len()))
}

/// Return the id of a request that came without one.
pub fn identify(signal: Signal, body: &[u8]) -> [u8; 16] {
    Blake2b::<U16>::new().chain_update(signal.name()).chain_update(body).finalize().into()
}

struct Walk<'p, 'a> {
    signal: Signal,
    limits: Limits,
    parts: usize,
    index: usize,
    span: Span<'a>,
    record: LogRecord<'a>,
    builder: Builder<'p>,
}

/// One `ResourceSpans` or `ScopeSpans`, or their kin of logs, without its children.
#[derive(Default)]
struct Head<'a> {
    message: Option<&'a [u8]>, // the resource or scope
    schema_url: &'a str,
    has_children: bool,
}

impl<'a> Walk<'_, 'a> {
    fn resource(&mut self, message: &'a [u8]) -> Result<()> {
        let head = self.head(message, SCOPES)?;
        let mut encoded: Option<EncodedResource<'a>> = None;
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut self.parts)? {
            let (SCOPES, Content::Delimited(scope)) = field else {
                continue;
            };
            let scope_head = self.head(scope, ITEMS)?;
            if !scope_head.has_children {
                self.count(scope)?;
                continue;
            }
            if encoded.is_none() {
                let message = head.message.unwrap_or_default();
                let resource = Resource::read(message, head.schema_url, self.allowance(message)?)?;
                encoded = Some(self.builder.resource(resource)?);
            }
            if let Some(resource) = &encoded {
                let message = scope_head.message.unwrap_or_default();
                let read = Scope::read(message, scope_head.schema_url, self.allowance(message)?)?;
                let mut shared = self.builder.share(resource, read)?;
                self.items(scope, &mut shared)?;
            }
        }
        Ok(())
    }

    fn items(&mut self, scope: &'a [u8], shared: &mut Shared<'_, 'a>) -> Result<()> {
        let mut fields = Fields::new(scope);
        while let Some(field) = fields.next(&mut self.parts)? {
            let (ITEMS, Content::Delimited(item)) = field else {
                continue;
            };
            if self.index == 0 {
                check_signal(self.signal, item)?;
            }
            let allowance = self.allowance(item)?;
            match self.signal {
                Signal::Traces => {
                    self.span.read(item, allowance)?;
                    self.builder.add_span(self.index, &self.span, shared)?;
                }
                Signal::Logs => {
                    self.record.read(item, allowance)?;
                    self.builder.add_log(self.index, &self.record, shared)?;
                }
            }
            self.index += 1;
        }
        Ok(())
    }

    /// Read what stands around the children: it may come after them.
    fn head(&self, message: &'a [u8], children: u32) -> Read<Head<'a>> {
        let mut head = Head::default();
        let mut rest = message.len();
        let mut fields = Fields::new(message);
        let mut allowance = usize::MAX; // they are counted by the second walk
        while let Some(field) = fields.next(&mut allowance)? {
            match field {
                (1, Content::Delimited(content)) => once(&mut head.message, content)?,
                (number, Content::Delimited(content)) if number == children => {
                    head.has_children = true;
                    rest -= content.len();
                }
                (3, Content::Delimited(content)) => head.schema_url = text(content)?,
                (1..=3, _) => return Err(Unusual),
                _ => {}
            }
        }
        // A resource of hundreds of kilobytes: the reference weighs it.
        if rest > self.limits.fields.saturating_mul(2) {
            return Err(Unusual);
        }
        Ok(head)
    }

    /// Walk the fields of a scope that has no items: they are parts, too.
    fn count(&mut self, scope: &[u8]) -> Read<()> {
        let mut fields = Fields::new(scope);
        while fields.next(&mut self.parts)?.is_some() {}
        Ok(())
    }

    /// How many fields an item, resource or scope may have.
    fn allowance(&self, message: &[u8]) -> Read<usize> {
        let is_weighed = message.len() > self.limits.fields.saturating_mul(2); // a field takes two bytes at least
        if is_weighed && message.len().saturating_mul(GROWTH_OF_TEXT) > self.limits.text_bytes {
            return Err(Unusual);
        }
        Ok(self.limits.fields.min(MOST_FIELDS))
    }
}

/// Leave a request to the reference unless its first item has a field by which it must be this signal's.
fn check_signal(signal: Signal, item: &[u8]) -> Read<()> {
    let mut fields = Fields::new(item);
    let mut allowance = FIELDS_SEEN;
    while let Some(field) = fields.next(&mut allowance)? {
        let evident = match signal {
            Signal::Traces => matches!(field, (1 | 2, Content::Delimited(_)) | (7 | 8, Content::Fixed64(_))),
            Signal::Logs => {
                matches!(field, (1 | 11, Content::Fixed64(_)) | (2, Content::Varint(_)) | (8, Content::Fixed32(_)))
            }
        };
        if evident {
            return Ok(());
        }
    }
    Err(Unusual)
}

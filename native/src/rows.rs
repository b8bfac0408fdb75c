//! The row builder: takes items as they are read, and makes the batch.

use std::collections::{HashMap, HashSet};

use crate::batch::{Batch, Halt, Hold, Receipt, Result};
use crate::copy::{self, pg_time};
use crate::facts::{Fact, Facts};
use crate::fields::{self, NOT_HEX, RESOURCE_FIELDS, SCOPE_FIELDS, SPAN_ID_BYTES, TRACE_ID_BYTES, is_zero};
use crate::json::{anomaly, repair};
use crate::messages::{LogRecord, Resource, Scope, Span};
use crate::packed::Packed;
use crate::plan::{Message, Messages, Place, Plan, RowPlan, Run, Signal};
use crate::values::Map;
use crate::wire::{Result as Read, Unusual};

// What a batch is reckoned to take in memory: the reference's figures, so that both cores admit the same requests.
const SPAN_OVERHEAD: usize = 700;
const LOG_OVERHEAD: usize = 250;
const RESOURCE: usize = 250;
const REJECTION: usize = 200;
const STEP: usize = 1 << 20; // bytes of growth between two calls of `hold`

const NS_PER_DAY: u64 = 86_400_000_000_000;
const STATUS_ERROR: i32 = 2; // OTLP's STATUS_CODE_ERROR
const NO_ATTRIBUTES: &Map<'static> = &Map::new();

/// A resource, ready for all its scopes.
pub struct EncodedResource<'a> {
    attributes: Map<'a>,
    fields: Packed,
    anomalies: u32,
    row: Vec<u8>,
}

impl EncodedResource<'_> {
    fn id(&self) -> Read<[u8; 16]> {
        let field = self.fields.get(0).and_then(copy::content).ok_or(Unusual)?;
        field.try_into().map_err(|_| Unusual)
    }
}

/// What all items of one scope have in common.
pub struct Shared<'r, 'a> {
    resource: &'r EncodedResource<'a>,
    resource_id: [u8; 16],
    attributes: Map<'a>,
    fields: Packed,
    anomalies: u32,
    /// Whether a row refers to the resource, which is then among `Batch::resources`.
    entered: bool,
    /// Position in `Facts::services`.
    service: usize,
}

impl Shared<'_, '_> {
    fn messages<'s>(&'s self, item: Option<Message<'s>>) -> Messages<'s> {
        messages(&self.fields, &self.attributes, &self.resource.attributes, item)
    }
}

/// The shared fields are the scope's, the resource's and the request's.
fn messages<'m>(
    fields: &'m Packed,
    scope: &'m Map<'m>,
    resource: &'m Map<'m>,
    item: Option<Message<'m>>,
) -> Messages<'m> {
    let of = |first, attributes| Message { fields, first, attributes };
    Messages {
        item,
        scope: Some(of(0, scope)),
        resource: of(SCOPE_FIELDS, resource),
        request: Some(of(SCOPE_FIELDS + RESOURCE_FIELDS, NO_ATTRIBUTES)),
    }
}

/// Collects the rows of one request.
pub struct Builder<'p> {
    plan: &'p Plan,
    receipt: &'p Receipt,
    hold: Hold<'p>,
    batch: Batch,
    entered: HashSet<[u8; 16]>,            // the ids in `Batch::resources`
    reason_places: HashMap<String, usize>, // in `Batch::reasons`
    told: usize,                           // the size that `hold` knows of
    // Buffers of one item.
    fields: Packed,
    picks: Packed,
    wanted: Vec<bool>,
}

impl<'p> Builder<'p> {
    /// `expected`: roughly how many bytes of rows there will be.
    pub fn new(plan: &'p Plan, receipt: &'p Receipt, expected: usize, hold: Hold<'p>) -> Self {
        let facts = Facts { sum_count: plan.rows.sums.len(), ..Facts::default() };
        Self {
            plan,
            receipt,
            hold,
            batch: Batch { rows: Packed::with_capacity(expected), facts, ..Batch::default() },
            entered: HashSet::new(),
            reason_places: HashMap::new(),
            told: 0,
            fields: Packed::default(),
            picks: Packed::default(),
            wanted: Vec::new(),
        }
    }

    /// Encode a resource, once for all its scopes.
    pub fn resource<'a>(&self, resource: Resource<'a>) -> Read<EncodedResource<'a>> {
        let plan = &self.plan.resources;
        let mut fields = Packed::default();
        let mut anomalies = fields::resource_fields(&resource, &mut fields)?;
        if resource.duplicate_key {
            anomalies |= anomaly::DUPLICATE_KEY;
        }
        let message = Message { fields: &fields, first: 0, attributes: &resource.attributes };
        let messages = Messages { item: None, scope: None, resource: message, request: None };
        let mut picks = Packed::default();
        for pick in &plan.shared_picks {
            anomalies |= pick.find(&messages, &mut picks)?;
        }
        for pick in picks.iter() {
            fields.push(pick);
        }
        let mut row = plan.header.to_vec();
        write(&plan.columns, [&Packed::default(), &Packed::default(), &fields], &mut row)?;
        Ok(EncodedResource { attributes: resource.attributes, fields, anomalies, row })
    }

    /// Encode what all items of a scope have in common.
    pub fn share<'r, 'a>(&mut self, resource: &'r EncodedResource<'a>, scope: Scope<'a>) -> Read<Shared<'r, 'a>> {
        let plan = &self.plan.rows;
        let mut fields = Packed::default();
        let mut anomalies = resource.anomalies | fields::scope_fields(&scope, &mut fields)?;
        if scope.duplicate_key {
            anomalies |= anomaly::DUPLICATE_KEY;
        }
        for field in resource.fields.iter().take(RESOURCE_FIELDS) {
            fields.push(field);
        }
        copy::bytea(&self.receipt.request_id, fields.open())?;
        fields.close();
        let mut picks = Packed::default();
        for pick in &plan.shared_picks {
            let messages = messages(&fields, &scope.attributes, &resource.attributes, None);
            anomalies |= pick.find(&messages, &mut picks)?;
        }
        for pick in picks.iter() {
            fields.push(pick);
        }
        if fields.total() > self.receipt.max_shared_bytes {
            return Err(Unusual);
        }
        let name = plan.service_name.and_then(|place| copy::content(fields.get(place)?));
        let name = name.map(|name| String::from_utf8_lossy(name).into_owned());
        if self.batch.facts.services.last() != Some(&name) {
            self.batch.facts.services.push(name);
        }
        Ok(Shared {
            resource,
            resource_id: resource.id()?,
            attributes: scope.attributes,
            fields,
            anomalies,
            entered: false,
            service: self.batch.facts.services.len().saturating_sub(1),
        })
    }

    /// Make a row of a span, or refuse it.
    pub fn add_span(&mut self, item: usize, span: &Span<'_>, shared: &mut Shared<'_, '_>) -> Result<()> {
        self.check_room(shared)?;
        if let Some(reason) = refusal(span) {
            return self.reject(item, reason);
        }
        self.fields.clear();
        let mut anomalies = fields::span_fields(span, &mut self.fields)?;
        if span.duplicate_key {
            anomalies |= anomaly::DUPLICATE_KEY;
        }
        anomalies |= shared.anomalies | self.locate(span.start);
        self.append(item, anomalies, &span.attributes, shared)?;
        self.batch.size += span.name.chars().count(); // kept for the trace
        self.keep_facts(span, shared)?;
        Ok(())
    }

    /// Make a row of a log record, or refuse it.
    pub fn add_log(&mut self, item: usize, record: &LogRecord<'_>, shared: &mut Shared<'_, '_>) -> Result<()> {
        self.check_room(shared)?;
        let time = [record.time, record.observed_time].into_iter().find(|time| *time != 0);
        let time = time.unwrap_or(self.receipt.now);
        self.fields.clear();
        let mut anomalies = fields::log_fields(record, time, &mut self.fields)?;
        if record.duplicate_key {
            anomalies |= anomaly::DUPLICATE_KEY;
        }
        if record.time == 0 {
            anomalies |= anomaly::TIME_SUBSTITUTED;
        }
        anomalies |= shared.anomalies | self.locate(time);
        self.append(item, anomalies, &record.attributes, shared)
    }

    /// Return the batch, of whose size the caller tells `hold`; `held` is what it keeps alive beside its rows.
    pub fn finish(mut self, held: usize) -> Batch {
        self.batch.size += held;
        self.batch
    }

    fn reject(&mut self, item: usize, reason: String) -> Result<()> {
        let (place, size) = match self.reason_places.get(&reason) {
            Some(place) => (*place, REJECTION),
            None => (self.batch.reasons.len(), REJECTION + reason.chars().count()),
        };
        if place == self.batch.reasons.len() {
            self.batch.reasons.push(reason.clone());
            self.reason_places.insert(reason, place);
        }
        self.batch.rejected.push((item, place));
        self.grow(size)
    }

    /// A request whose rows find no room is left to the reference, which need not even decode the rest.
    fn check_room(&self, shared: &Shared<'_, '_>) -> Read<()> {
        let needed = self.batch.rows.total() + shared.fields.total();
        if needed > self.receipt.max_batch_bytes { Err(Unusual) } else { Ok(()) }
    }

    /// Note the partition that a time needs, or that it lies outside the accepted window.
    fn locate(&mut self, time: u64) -> u32 {
        if (self.receipt.earliest..=self.receipt.latest).contains(&i128::from(time)) {
            self.batch.days.insert(time / NS_PER_DAY);
            0
        } else {
            anomaly::TIME_OUTSIDE_WINDOW
        }
    }

    /// Add the row of the item whose fields, but for `anomalies`, are encoded.
    fn append(&mut self, item: usize, anomalies: u32, attributes: &Map<'_>, shared: &mut Shared<'_, '_>) -> Result<()> {
        let plan = &self.plan.rows;
        copy::int4(anomalies as i32, self.fields.open());
        self.fields.close();
        self.picks.clear();
        let message = Message { fields: &self.fields, first: 0, attributes };
        let found = plan.pick(&shared.messages(Some(message)), &mut self.wanted, &mut self.picks)?;
        let anomalies = anomalies | found;
        self.fields.reopen(self.plan.signal.item_fields() - 1);
        copy::int4(anomalies as i32, self.fields.open());
        self.fields.close();

        let before = self.batch.rows.total();
        let row = self.batch.rows.open();
        row.extend_from_slice(&plan.header);
        write(&plan.columns, [&self.fields, &self.picks, &shared.fields], row)?;
        self.batch.rows.close();
        if !shared.entered {
            self.enter(shared);
        }
        for (bit, count) in self.batch.repairs.iter_mut().enumerate() {
            *count += (anomalies >> bit & 1) as usize;
        }
        self.batch.items.push(item);
        self.batch.resource_ids.push(&shared.resource_id);
        let overhead = match self.plan.signal {
            Signal::Traces => SPAN_OVERHEAD,
            Signal::Logs => LOG_OVERHEAD,
        };
        self.grow(self.batch.rows.total() - before + overhead)
    }

    /// Enter a resource to which a row refers for the first time.
    fn enter(&mut self, shared: &mut Shared<'_, '_>) {
        shared.entered = true;
        if self.entered.insert(shared.resource_id) {
            self.batch.resources.push((shared.resource_id, shared.resource.row.clone()));
            self.batch.size += shared.resource.row.len() + RESOURCE;
        }
    }

    fn keep_facts(&mut self, span: &Span<'_>, shared: &Shared<'_, '_>) -> Read<()> {
        let RowPlan { key, sums, .. } = &self.plan.rows;
        let parts = [&self.fields, &self.picks, &shared.fields];
        for place in key {
            let content = field(*place, parts).and_then(|field| field.get(copy::NULL.len()..));
            self.batch.keys.open().extend_from_slice(content.unwrap_or_default());
        }
        self.batch.keys.close();
        let sum = |place| field(place, parts).and_then(copy::content)?.try_into().ok().map(i64::from_be_bytes);
        let sums = self.batch.facts.keep_sums(sums.iter().copied().map(sum));
        self.batch.facts.names.push(repair(span.name).0.as_bytes());
        let start = pg_time(span.start);
        self.batch.facts.spans.push(Fact {
            trace_id: span.trace_id.try_into().map_err(|_| Unusual)?,
            span_id: span.span_id.try_into().map_err(|_| Unusual)?,
            start,
            end: start.max(pg_time(span.end)),
            error: span.status_code == STATUS_ERROR,
            root: is_zero(span.parent_span_id),
            service: shared.service,
            sums,
        });
        Ok(())
    }

    fn grow(&mut self, size: usize) -> Result<()> {
        self.batch.size += size;
        if self.batch.size - self.told < STEP {
            return Ok(());
        }
        self.told = self.batch.size;
        if (self.hold)(self.told) { Ok(()) } else { Err(Halt::Refused) }
    }
}

/// Return fields that follow one another, from a place on.
fn run(first: Place, count: usize, [fields, picks, shared]: [&Packed; 3]) -> Option<&[u8]> {
    match first {
        Place::Field(index) => fields.run(index..index + count),
        Place::Pick(index) => picks.run(index..index + count),
        Place::Shared(index) => shared.run(index..index + count),
    }
}

fn field(place: Place, parts: [&Packed; 3]) -> Option<&[u8]> {
    run(place, 1, parts)
}

fn write(columns: &[Run], parts: [&Packed; 3], row: &mut Vec<u8>) -> Read<()> {
    for column in columns {
        row.extend_from_slice(run(column.first, column.count, parts).ok_or(Unusual)?);
    }
    Ok(())
}

/// Say why a span is refused: its ids are the key, and bad ones would make many spans collapse into one row.
fn refusal(span: &Span<'_>) -> Option<String> {
    let trace_fault = id_fault("trace_id", span.trace_id, TRACE_ID_BYTES);
    let span_fault = id_fault("span_id", span.span_id, SPAN_ID_BYTES);
    match (trace_fault, span_fault) {
        (Some(trace), Some(span)) => Some(format!("{trace}; {span}")),
        (trace, span) => trace.or(span),
    }
}

fn id_fault(name: &str, id: &[u8], size: usize) -> Option<String> {
    if id.is_empty() {
        Some(format!("{name} is empty"))
    } else if id.starts_with(NOT_HEX) {
        Some(format!("{name} is not {} hexadecimal digits", 2 * size))
    } else if id.len() != size {
        Some(format!("{name} has {} bytes, not {size}", grouped(id.len())))
    } else if is_zero(id) {
        Some(format!("{name} is all zeros"))
    } else {
        None
    }
}

/// Spell a number with a comma between thousands.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut spelled = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            spelled.push(',');
        }
        spelled.push(digit);
    }
    spelled
}

#[cfg(test)]
mod tests {
    #[test]
    fn thousands_are_grouped() {
        assert_eq!(["1", "999", "1,000", "268,435,456"], [1, 999, 1000, 268_435_456].map(super::grouped)[..]);
    }
}

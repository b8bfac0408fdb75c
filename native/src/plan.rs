//! Plans: a table's mapping, as `otel_pg_exporter/transcode/plan.py` compiled it.
//!
//! A row is picked from one flat vector of fields: the item's own, the item's picks, and what its scope shares.

use std::collections::HashMap;

use foldhash::fast::FixedState;

use crate::copy;
use crate::fields::{LOG_FIELDS, RESOURCE_FIELDS, SCOPE_FIELDS, SPAN_FIELDS};
use crate::json::{anomaly, repair};
use crate::packed::Packed;
use crate::values::{Map, Value};
use crate::wire::{Result, text};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    Traces,
    Logs,
}

impl Signal {
    pub fn name(self) -> &'static str {
        match self {
            Self::Traces => "traces",
            Self::Logs => "logs",
        }
    }

    /// How many fields an item has before its picks.
    pub fn item_fields(self) -> usize {
        match self {
            Self::Traces => SPAN_FIELDS,
            Self::Logs => LOG_FIELDS,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Item,
    Scope,
    Resource,
    Request,
}

/// What a pick may look at in one message: its fields, from `first` in `fields`, and its attributes.
#[derive(Clone, Copy)]
pub struct Message<'m> {
    pub fields: &'m Packed,
    pub first: usize,
    pub attributes: &'m Map<'m>,
}

/// All messages that the picks of one row may look at.
#[derive(Clone, Copy)]
pub struct Messages<'m> {
    pub item: Option<Message<'m>>,
    pub scope: Option<Message<'m>>,
    pub resource: Message<'m>,
    pub request: Option<Message<'m>>,
}

impl<'m> Messages<'m> {
    fn of(&self, origin: Origin) -> Option<Message<'m>> {
        match origin {
            Origin::Item => self.item,
            Origin::Scope => self.scope,
            Origin::Resource => Some(self.resource),
            Origin::Request => self.request,
        }
    }
}

/// One source of a pick: an attribute's key, or without one a field's position among its message's fields.
#[derive(Clone, Debug)]
pub struct Source {
    pub origin: Origin,
    pub position: usize,
    pub key: Option<String>,
}

/// Which values fit a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    Text,
    Bool,
    Int8,
    Float8,
    Jsonb,
    Nothing,
}

/// A column whose value is searched for: the first source with a fitting value wins.
#[derive(Clone, Debug)]
pub struct Pick {
    pub sources: Vec<Source>,
    pub fit: Fit,
    pub max_bytes: Option<usize>,
}

impl Pick {
    /// Append the column's field, NULL when no source has a value that fits; return the repairs that it took.
    pub fn find(&self, messages: &Messages<'_>, out: &mut Packed) -> Result<u32> {
        for source in &self.sources {
            let Some(message) = messages.of(source.origin) else {
                continue;
            };
            let fitted = match &source.key {
                Some(key) => match message.attributes.iter().find(|(name, _)| name == key) {
                    Some((_, value)) => self.fit(value, out.open())?,
                    None => None,
                },
                None => self.field(message.fields.get(message.first + source.position), out.open())?,
            };
            if let Some(found) = fitted {
                out.close();
                return Ok(found);
            }
        }
        out.push(&copy::NULL);
        Ok(0)
    }

    fn field(&self, field: Option<&[u8]>, out: &mut Vec<u8>) -> Result<Option<u32>> {
        let Some((field, content)) = field.and_then(|field| Some((field, copy::content(field)?))) else {
            return Ok(None);
        };
        if self.max_bytes.is_some() {
            return self.fit(&Value::Text(text(content)?), out);
        }
        out.extend_from_slice(field);
        Ok(Some(0))
    }

    fn fit(&self, value: &Value<'_>, out: &mut Vec<u8>) -> Result<Option<u32>> {
        match (self.fit, value) {
            (Fit::Text, Value::Text(text)) => return self.text(text, out).map(Some),
            (Fit::Bool, Value::Bool(value)) => copy::boolean(*value, out),
            (Fit::Int8, Value::Int(number)) => copy::int8(*number, out),
            (Fit::Float8, Value::Int(number)) => copy::float8(*number as f64, out),
            (Fit::Float8, Value::Double(number)) => copy::float8(*number, out),
            (Fit::Jsonb, Value::Null) => return Ok(None),
            (Fit::Jsonb, value) => return copy::jsonb(out, |json| json.value(value)).map(Some),
            _ => return Ok(None),
        }
        Ok(Some(0))
    }

    fn text(&self, value: &str, out: &mut Vec<u8>) -> Result<u32> {
        let (value, repaired) = repair(value);
        let most = self.max_bytes.unwrap_or(value.len()).min(value.len());
        let end = (0..=most).rev().find(|end| value.is_char_boundary(*end)).unwrap_or(0);
        let kept = value.get(..end).unwrap_or_default();
        copy::bytea(kept.as_bytes(), out)?;
        let cut = if kept.len() < value.len() { anomaly::TEXT_CUT } else { 0 };
        Ok(cut | if repaired { anomaly::TEXT_REPAIRED } else { 0 })
    }
}

/// Where a column's field stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Field(usize),
    Pick(usize),
    Shared(usize),
}

impl Place {
    fn after(self, count: usize) -> Self {
        match self {
            Self::Field(index) => Self::Field(index + count),
            Self::Pick(index) => Self::Pick(index + count),
            Self::Shared(index) => Self::Shared(index + count),
        }
    }
}

/// Fields that follow one another in the row as they do in their part of the vector.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub first: Place,
    pub count: usize,
}

fn runs(places: &[Place]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for &place in places {
        match runs.last_mut() {
            Some(run) if run.first.after(run.count) == place => run.count += 1,
            _ => runs.push(Run { first: place, count: 1 }),
        }
    }
    runs
}

/// How one table's rows are made.
pub struct RowPlan {
    pub header: [u8; 2],
    /// The columns' places, those that follow one another as one.
    pub columns: Vec<Run>,
    pub key: Vec<Place>,
    pub sums: Vec<Place>,
    pub item_picks: Vec<Pick>,
    pub shared_picks: Vec<Pick>,
    pub service_name: Option<usize>,
    /// Item attribute to the picks that look at it.
    picks_by_key: HashMap<String, Vec<usize>, FixedState>,
    /// Picks that look at more than item attributes.
    always_picked: Vec<usize>,
}

/// Positions in the vector of fields, as Python has them.
pub struct Positions {
    pub columns: Vec<usize>,
    pub key: Vec<usize>,
    pub sums: Vec<usize>,
}

impl RowPlan {
    /// `item_fields`: how many fields an item has of its own; 0 for resources, which have no items.
    pub fn new(
        item_fields: usize,
        positions: &Positions,
        item_picks: Vec<Pick>,
        shared_picks: Vec<Pick>,
        service_name: Option<usize>,
    ) -> Self {
        let shared_start = item_fields + item_picks.len();
        let places = |positions: &[usize]| -> Vec<Place> {
            positions
                .iter()
                .map(|&position| {
                    if position < item_fields {
                        Place::Field(position)
                    } else if position < shared_start {
                        Place::Pick(position - item_fields)
                    } else {
                        Place::Shared(position - shared_start)
                    }
                })
                .collect()
        };
        let mut picks_by_key: HashMap<String, Vec<usize>, FixedState> = HashMap::default();
        let mut always_picked = Vec::new();
        for (index, pick) in item_picks.iter().enumerate() {
            for source in &pick.sources {
                match &source.key {
                    Some(key) if source.origin == Origin::Item => {
                        picks_by_key.entry(key.clone()).or_default().push(index);
                    }
                    _ => always_picked.push(index),
                }
            }
        }
        Self {
            header: (positions.columns.len() as u16).to_be_bytes(),
            columns: runs(&places(&positions.columns)),
            key: places(&positions.key),
            sums: places(&positions.sums),
            item_picks,
            shared_picks,
            service_name,
            picks_by_key,
            always_picked,
        }
    }

    /// Whether a row holds something of the request, which is its id.
    pub fn has_request(&self) -> bool {
        let picks = self.item_picks.iter().chain(&self.shared_picks);
        let mut columns = self.columns.iter().flat_map(|run| (0..run.count).map(|index| run.first.after(index)));
        picks.flat_map(|pick| &pick.sources).any(|source| source.origin == Origin::Request)
            || columns.any(|place| place == Place::Shared(SCOPE_FIELDS + RESOURCE_FIELDS))
    }

    /// Append an item's picks; most have no attribute of theirs and are NULL without a search.
    ///
    /// `wanted` is a buffer, empty before and after.
    pub fn pick(&self, messages: &Messages<'_>, wanted: &mut Vec<bool>, out: &mut Packed) -> Result<u32> {
        wanted.resize(self.item_picks.len(), false);
        let keys = messages.item.map_or(&[][..], |item| item.attributes);
        let hits = keys.iter().filter_map(|(key, _)| self.picks_by_key.get(*key)).flatten();
        for &index in hits.chain(&self.always_picked) {
            if let Some(wanted) = wanted.get_mut(index) {
                *wanted = true;
            }
        }
        let mut found = 0;
        for (pick, wanted) in self.item_picks.iter().zip(wanted.drain(..)) {
            if wanted {
                found |= pick.find(messages, out)?;
            } else {
                out.push(&copy::NULL);
            }
        }
        Ok(found)
    }
}

/// All that transcoding one signal needs to know about tables.
pub struct Plan {
    pub signal: Signal,
    pub rows: RowPlan,
    pub resources: RowPlan,
}

//! What a batch of spans adds to `traces`: one aggregate a trace, as the arrays that the upsert takes.

use std::collections::{BTreeMap, BTreeSet};

use crate::facts::Facts;
use crate::merge::Joined;

/// The smallest names win: see `otel_pg_exporter/postgres/traces.py`.
const MAX_SERVICE_NAMES: usize = 100;

const NULL: i32 = -1;

/// The contribution of one batch to one trace.
#[derive(Debug)]
struct Aggregate {
    start: i64,
    end: i64,
    spans: i64,
    errors: i64,
    root: Option<Root>,
    service_names: BTreeSet<String>,
    sums: Vec<Option<i128>>,
}

#[derive(Debug)]
struct Root {
    start: i64,
    span_id: [u8; 8],
    name: Vec<u8>,
    service_name: Option<String>,
}

/// Aggregates by trace id, in its order: that is the order in which their rows are locked.
#[derive(Debug, Default)]
pub struct Traces {
    aggregates: BTreeMap<[u8; 16], Aggregate>,
}

impl Traces {
    /// Sum up the spans of these rows.
    pub fn of(facts: &Joined<Facts>, rows: &[usize]) -> Self {
        let mut traces = Self::default();
        for (facts, index) in rows.iter().filter_map(|row| facts.find(*row)) {
            traces.add(facts, index);
        }
        traces
    }

    fn add(&mut self, facts: &Facts, index: usize) {
        let Some(fact) = facts.spans.get(index) else { return };
        let trace = self.aggregates.entry(fact.trace_id).or_insert_with(|| Aggregate {
            start: fact.start,
            end: fact.end,
            spans: 0,
            errors: 0,
            root: None,
            service_names: BTreeSet::new(),
            sums: vec![None; facts.sum_count],
        });
        trace.start = trace.start.min(fact.start);
        trace.end = trace.end.max(fact.end);
        trace.spans += 1;
        trace.errors += i64::from(fact.error);
        let earlier = |root: &Root| (fact.start, fact.span_id) < (root.start, root.span_id);
        if fact.root && trace.root.as_ref().is_none_or(earlier) {
            trace.root = Some(Root {
                start: fact.start,
                span_id: fact.span_id,
                name: facts.names.get(index).unwrap_or_default().to_vec(),
                service_name: facts.service(fact).map(str::to_owned),
            });
        }
        let new_service = facts.service(fact).filter(|name| !trace.service_names.contains(*name));
        trace.service_names.extend(new_service.map(str::to_owned));
        for (sum, tokens) in trace.sums.iter_mut().zip(facts.sums_of(fact)) {
            if let Some(tokens) = tokens {
                *sum = Some(sum.unwrap_or(0) + i128::from(*tokens));
            }
        }
    }

    pub fn ids(&self) -> impl Iterator<Item = &[u8; 16]> {
        self.aggregates.keys()
    }

    /// Return one binary array a column, of the types with these oids, for the traces with these ids.
    pub fn parameters(&self, ids: &[[u8; 16]], oids: &[u32]) -> Vec<Vec<u8>> {
        let mut columns: Vec<Array> = oids.iter().map(|oid| Array::new(*oid)).collect();
        for (id, trace) in ids.iter().filter_map(|id| self.aggregates.get_key_value(id)) {
            let mut places = columns.iter_mut();
            let mut put = |value: Option<&[u8]>| places.next().into_iter().for_each(|column| column.push(value));
            let root = trace.root.as_ref();
            put(Some(id));
            for number in [trace.start, trace.end, trace.spans, trace.errors] {
                put(Some(&number.to_be_bytes()));
            }
            put(root.map(|root| &root.span_id[..]));
            put(root.map(|root| root.start.to_be_bytes()).as_ref().map(|start| &start[..]));
            put(root.map(|root| &root.name[..]));
            put(root.and_then(|root| root.service_name.as_deref()).map(str::as_bytes));
            put(Some(array_literal(&trace.service_names).as_bytes()));
            for sum in &trace.sums {
                put(sum.map(|sum| sum.to_string()).as_deref().map(str::as_bytes));
            }
        }
        columns.into_iter().map(Array::finish).collect()
    }
}

fn array_literal(names: &BTreeSet<String>) -> String {
    let mut literal = String::from("{");
    for (index, name) in names.iter().take(MAX_SERVICE_NAMES).enumerate() {
        literal.push_str(if index > 0 { ",\"" } else { "\"" });
        for character in name.chars() {
            if matches!(character, '"' | '\\') {
                literal.push('\\');
            }
            literal.push(character);
        }
        literal.push('"');
    }
    literal.push('}');
    literal
}

/// A one-dimensional PostgreSQL array in binary format, as it grows.
struct Array {
    oid: u32,
    count: i32,
    elements: Vec<u8>,
}

impl Array {
    fn new(oid: u32) -> Self {
        Self { oid, count: 0, elements: Vec::new() }
    }

    fn push(&mut self, value: Option<&[u8]>) {
        let length = value.map_or(NULL, |value| value.len() as i32);
        self.elements.extend_from_slice(&length.to_be_bytes());
        self.elements.extend_from_slice(value.unwrap_or_default());
        self.count += 1;
    }

    fn finish(self) -> Vec<u8> {
        let dimensions = i32::from(self.count > 0);
        let mut data = Vec::with_capacity(20 + self.elements.len());
        for word in [dimensions, dimensions, self.oid as i32] {
            data.extend_from_slice(&word.to_be_bytes());
        }
        if self.count > 0 {
            data.extend_from_slice(&self.count.to_be_bytes());
            data.extend_from_slice(&1i32.to_be_bytes());
            data.extend_from_slice(&self.elements);
        }
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_names_are_quoted_and_no_more_than_the_column_takes() {
        let names = BTreeSet::from(["b\"\\".to_owned(), "a".to_owned()]);
        assert_eq!(array_literal(&names), "{\"a\",\"b\\\"\\\\\"}");
        let many: BTreeSet<String> = (100..300).map(|number| number.to_string()).collect();
        assert_eq!(array_literal(&many).split(',').count(), MAX_SERVICE_NAMES);
    }

    #[test]
    fn an_empty_array_has_no_dimension() {
        assert_eq!(Array::new(20).finish(), b"\0\0\0\0\0\0\0\0\0\0\0\x14");
        let mut array = Array::new(25);
        array.push(None);
        array.push(Some(b"x"));
        assert_eq!(array.finish(), b"\0\0\0\x01\0\0\0\x01\0\0\0\x19\0\0\0\x02\0\0\0\x01\xff\xff\xff\xff\0\0\0\x01x");
    }
}

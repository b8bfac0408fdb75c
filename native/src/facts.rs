//! What each span contributes to its `traces` row.

use crate::packed::Packed;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fact {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    /// Microseconds since 2000-01-01 UTC, as PostgreSQL has it.
    pub start: i64,
    /// The greater of start and end.
    pub end: i64,
    pub error: bool,
    pub root: bool,
    /// Position of the service's name in [`Facts::services`].
    pub service: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub spans: Vec<Fact>,
    /// The name of each span.
    pub names: Packed,
    /// The service name of each scope, or none.
    pub services: Vec<Option<String>>,
    /// `sum_count` of each span, in the order of `Table.sums`.
    pub sums: Vec<Option<i64>>,
    pub sum_count: usize,
}

impl Facts {
    pub fn service(&self, fact: &Fact) -> Option<&str> {
        self.services.get(fact.service)?.as_deref()
    }

    pub fn sums_of(&self, index: usize) -> &[Option<i64>] {
        let start = index * self.sum_count;
        self.sums.get(start..start + self.sum_count).unwrap_or_default()
    }
}

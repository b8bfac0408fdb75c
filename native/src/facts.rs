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
    /// Position of its first sum in [`Facts::sums`]; `None` when it has none. Most spans have none, and to read that
    /// for each took half the time of summing up.
    pub sums: Option<usize>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub spans: Vec<Fact>,
    /// The name of each span.
    pub names: Packed,
    /// The service name of each scope, or none.
    pub services: Vec<Option<String>>,
    /// `sum_count` of each span that has any, in the order of `Table.sums`.
    pub sums: Vec<Option<i64>>,
    pub sum_count: usize,
}

impl Facts {
    pub fn service(&self, fact: &Fact) -> Option<&str> {
        self.services.get(fact.service)?.as_deref()
    }

    /// Return a span's sums; empty when it has none.
    pub fn sums_of(&self, fact: &Fact) -> &[Option<i64>] {
        fact.sums.and_then(|first| self.sums.get(first..first + self.sum_count)).unwrap_or_default()
    }

    /// Keep the next span's sums; return what its fact says of them.
    pub fn keep_sums(&mut self, sums: impl Iterator<Item = Option<i64>>) -> Option<usize> {
        let first = self.sums.len();
        self.sums.extend(sums);
        let has_any = self.sums.iter().skip(first).any(Option::is_some);
        if !has_any {
            self.sums.truncate(first);
        }
        has_any.then_some(first)
    }
}

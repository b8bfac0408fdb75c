//! What goes into transcoding beside the body, and what comes of it.

use std::collections::BTreeSet;

use crate::facts::Facts;
use crate::json::anomaly;
use crate::packed::Packed;
use crate::wire::Unusual;

/// Why a request yields no batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halt {
    /// The reference must see to it.
    Unusual,
    /// `hold` found no room.
    Refused,
}

impl From<Unusual> for Halt {
    fn from(_: Unusual) -> Self {
        Self::Unusual
    }
}

pub type Result<T> = std::result::Result<T, Halt>;

/// Told how many bytes the request holds by now; says whether there is room for them.
pub type Hold<'h> = &'h mut dyn FnMut(usize) -> bool;

/// What is known of a request beside its body.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// All zeros where no row holds it.
    pub request_id: [u8; 16],
    /// Nanoseconds since 1970; from `earliest` to `latest` is the accepted window.
    pub now: u64,
    pub earliest: i128,
    pub latest: i128,
    /// Of rows.
    pub max_batch_bytes: usize,
    /// That a scope adds to every row.
    pub max_shared_bytes: usize,
}

/// One request, transcoded: see `RowBatch` in `otel_pg_exporter/model.py`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    pub rows: Packed,
    pub keys: Packed,
    pub facts: Facts,
    pub items: Vec<usize>,
    pub resource_ids: Packed,
    pub resources: Vec<([u8; 16], Vec<u8>)>,
    pub days: BTreeSet<u64>,
    /// Item, and position of its reason in `reasons`.
    pub rejected: Vec<(usize, usize)>,
    pub reasons: Vec<String>,
    /// How many items have each single bit.
    pub repairs: [usize; anomaly::COUNT],
    pub size: usize,
}

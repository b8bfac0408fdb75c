//! Any bytes: no panic, no overflow, and rows that hold together. Equality with the reference is for Python's tests.

#![no_main]

use std::collections::BTreeSet;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use otel_pg_exporter_native::batch::{Batch, Receipt};
use otel_pg_exporter_native::merge::Joined;
use otel_pg_exporter_native::packed::Packed;
use otel_pg_exporter_native::plan::{Fit, Origin, Pick, Plan, Positions, RowPlan, Signal, Source};
use otel_pg_exporter_native::request::{Limits, transcode};
use otel_pg_exporter_native::traces::Traces;

const RECEIPT: Receipt =
    Receipt { request_id: [7; 16], now: 1, earliest: 0, latest: 1 << 62, max_batch_bytes: 1 << 20, max_shared_bytes: 1 << 14 };
const LIMITS: Limits = Limits { parts: 1000, fields: 1000, text_bytes: 1 << 20 };

fn pick(fit: Fit, origins: &[Origin]) -> Pick {
    let source = |origin: &Origin| Source { origin: *origin, position: 1, key: Some("k".to_owned()) };
    let field = Source { origin: Origin::Scope, position: 0, key: None };
    Pick { sources: origins.iter().map(source).chain([field]).collect(), fit, max_bytes: Some(3) }
}

/// A plan in which every field is a column, and every kind of pick looks at the attribute `k`.
fn plan(signal: Signal) -> Plan {
    let fits = [Fit::Text, Fit::Bool, Fit::Int8, Fit::Float8, Fit::Jsonb];
    let item_picks: Vec<Pick> = fits.iter().map(|fit| pick(*fit, &[Origin::Item, Origin::Resource])).collect();
    let shared_picks = vec![pick(Fit::Text, &[Origin::Resource, Origin::Scope])];
    let width = signal.item_fields() + item_picks.len() + 11 + shared_picks.len();
    let positions = Positions { columns: (0..width).collect(), key: vec![9, 0, 1, 10], sums: vec![20, 23] };
    let resources = Positions { columns: (0..6).collect(), key: vec![0], sums: vec![] };
    Plan {
        signal,
        rows: RowPlan::new(signal.item_fields(), &positions, item_picks, shared_picks, Some(11)),
        resources: RowPlan::new(0, &resources, vec![], vec![pick(Fit::Text, &[Origin::Resource])], None),
    }
}

fn check(plan: &Plan, batch: Batch) {
    let count = batch.rows.len();
    assert_eq!((batch.items.len(), batch.resource_ids.len()), (count, count));
    let known: BTreeSet<_> = batch.resources.iter().map(|(id, _)| &id[..]).collect();
    assert!(batch.resource_ids.iter().all(|id| known.contains(id)));
    let items: BTreeSet<usize> = batch.items.iter().chain(batch.rejected.iter().map(|(item, _)| item)).copied().collect();
    assert_eq!(items.len(), count + batch.rejected.len());
    assert!(items.iter().copied().eq(0..items.len()));
    for row in batch.rows.iter() {
        let mut rest = &row[2..];
        for _ in 0..plan.rows.columns.iter().map(|run| run.count).sum::<usize>() {
            let (length, after) = rest.split_first_chunk().unwrap();
            rest = &after[i32::from_be_bytes(*length).max(0) as usize..];
        }
        assert!(rest.is_empty());
    }
    let order = Joined::new([Arc::new(batch.keys.clone())], Packed::len).order();
    assert!(order.survivors.windows(2).all(|pair| batch.keys.get(pair[0]) < batch.keys.get(pair[1])));
    let facts = Joined::new([Arc::new(batch.facts)], |facts| facts.spans.len());
    let traces = Traces::of(&facts, &order.survivors);
    let ids: Vec<_> = traces.ids().copied().collect();
    assert_eq!(traces.parameters(&ids, &[0; 12]).len(), 12);
}

fuzz_target!(|body: &[u8]| {
    for signal in [Signal::Traces, Signal::Logs] {
        let plan = plan(signal);
        if let Ok(batch) = transcode(&plan, body, &RECEIPT, LIMITS, &mut |_| true) {
            check(&plan, batch);
        }
    }
});

//! What Python sees. The work is done with the GIL released; rows, keys and facts stay in Rust.

#![expect(clippy::needless_pass_by_value, reason = "PyO3 hands over what it has made")]

mod plan;
mod sequences;
mod traces;

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyString, PyTuple};

use crate::batch::{Batch, Halt, Receipt};
use crate::fields::{LOG_FIELDS, REQUEST_FIELDS, RESOURCE_FIELDS, SCOPE_FIELDS, SPAN_FIELDS};
use crate::request::{self, Limits};
use plan::PyPlan;
use sequences::{PyFacts, PyPositions, PyRows, out_of_range};
use traces::PyTraces;

/// Make rows of an OTLP export request; `None` when the reference must see to it.
///
/// Returns the request's id where it was given or rows hold it, rows, keys, facts, items where some were rejected,
/// resource ids, resources, days, rejected items with their reasons, how many items have each anomaly bit, and the size.
#[pyfunction]
#[pyo3(signature = (plan, body, request_id, *, now_ns, window, limits, room, hold))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
fn transcode<'py>(
    py: Python<'py>,
    plan: &Bound<'py, PyPlan>,
    body: &Bound<'py, PyBytes>,
    request_id: Option<[u8; 16]>,
    now_ns: u64,
    window: (i128, i128),
    limits: (usize, usize, usize),
    room: (usize, usize),
    hold: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyTuple>>> {
    let (earliest, latest) = window;
    let (max_batch_bytes, max_shared_bytes) = room;
    let (parts, fields, text_bytes) = limits;
    let limits = Limits { parts, fields, text_bytes };
    let (plan, body) = (&plan.get().0, body.as_bytes());
    let hold = hold.map(Bound::unbind);
    let mut refused = None;
    let mut tell = |size: usize| match &hold {
        None => true,
        Some(hold) => Python::attach(|py| hold.call1(py, (size,))).map_err(|error| refused = Some(error)).is_ok(),
    };
    // A panic would be a bug. The reference then serves the request, and the panic's message is on stderr.
    let mut work = || {
        let request_id = request_id.or_else(|| plan.rows.has_request().then(|| request::identify(plan.signal, body)));
        let zeros = request_id.unwrap_or_default();
        let receipt = Receipt { request_id: zeros, now: now_ns, earliest, latest, max_batch_bytes, max_shared_bytes };
        Ok((request_id, request::transcode(plan, body, &receipt, limits, &mut tell)?))
    };
    let result = py.detach(|| catch_unwind(AssertUnwindSafe(&mut work)).unwrap_or(Err(Halt::Unusual)));
    match (result, refused) {
        (Ok((request_id, batch)), _) => {
            // The last call, here instead of inside: to take the GIL again is what costs most about it.
            if let Some(hold) = &hold {
                hold.call1(py, (batch.size,))?;
            }
            to_python(py, request_id, batch).map(Some)
        }
        (Err(_), Some(error)) => Err(error),
        (Err(_), None) => Ok(None),
    }
}

fn to_python(py: Python<'_>, request_id: Option<[u8; 16]>, batch: Batch) -> PyResult<Bound<'_, PyTuple>> {
    let resources = PyDict::new(py);
    for (id, row) in &batch.resources {
        resources.set_item(PyBytes::new(py, id), PyBytes::new(py, row))?;
    }
    let reasons: Vec<_> = batch.reasons.iter().map(|reason| PyString::new(py, reason)).collect();
    let items = if batch.rejected.is_empty() { None } else { Some(batch.items) };
    let rejected = PyList::empty(py);
    for (item, place) in batch.rejected {
        rejected.append((item, reasons.get(place).ok_or_else(out_of_range)?))?;
    }
    (
        request_id.map(|id| PyBytes::new(py, &id)),
        PyRows::from(batch.rows),
        PyRows::from(batch.keys),
        PyFacts::from(batch.facts),
        items,
        PyRows::from(batch.resource_ids),
        resources,
        PyList::new(py, batch.days)?,
        rejected,
        batch.repairs,
        batch.size,
    )
        .into_pyobject(py)
}

/// The native core of `otel_pg_exporter.transcode`.
#[pymodule(gil_used = true)]
mod _native {
    use pyo3::types::PySequence;

    use super::{LOG_FIELDS, REQUEST_FIELDS, RESOURCE_FIELDS, SCOPE_FIELDS, SPAN_FIELDS};
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::{PyFacts, PyPlan, PyPositions, PyRows, PyTraces, transcode};

    /// How many fields each message has; they must be those of `mapping.FIELDS`.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let counts = [
            ("span", SPAN_FIELDS),
            ("log", LOG_FIELDS),
            ("scope", SCOPE_FIELDS),
            ("resource", RESOURCE_FIELDS),
            ("request", REQUEST_FIELDS),
        ];
        module.add("FIELDS", std::collections::BTreeMap::from(counts))?;
        PySequence::register::<PyRows>(module.py())?;
        PySequence::register::<PyPositions>(module.py())?;
        PySequence::register::<PyFacts>(module.py())
    }
}

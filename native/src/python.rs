//! What Python sees. The work is done with the GIL released; rows, keys and facts stay in Rust, as lazy sequences.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyList, PySequence, PyString, PyTuple};

use crate::batch::{Batch, Halt, Receipt};
use crate::facts::Facts;
use crate::fields::{LOG_FIELDS, REQUEST_FIELDS, RESOURCE_FIELDS, SCOPE_FIELDS, SPAN_FIELDS};
use crate::packed::Packed;
use crate::plan::{Fit, Origin, Pick, Plan, Positions, RowPlan, Signal, Source};
use crate::request::{self, Limits};

type SourceArguments = (String, usize, Option<String>);
type PickArguments = (String, Option<usize>, Vec<SourceArguments>);

/// Columns, key, sums, the item's picks, shared picks, and the position of `service_name` among the shared fields.
type RowArguments = (Vec<usize>, Vec<usize>, Vec<usize>, Vec<PickArguments>, Vec<PickArguments>, Option<usize>);

/// A compiled mapping.
#[pyclass(frozen, name = "Plan", module = "otel_pg_exporter._native")]
struct PyPlan(Plan);

#[pymethods]
impl PyPlan {
    #[new]
    fn new(signal: &str, rows: RowArguments, resources: RowArguments) -> PyResult<Self> {
        let signal = match signal {
            "traces" => Signal::Traces,
            "logs" => Signal::Logs,
            _ => return Err(PyValueError::new_err(format!("no such signal: {signal}"))),
        };
        Ok(Self(Plan { signal, rows: row_plan(signal.item_fields(), rows)?, resources: row_plan(0, resources)? }))
    }
}

fn row_plan(item_fields: usize, arguments: RowArguments) -> PyResult<RowPlan> {
    let (columns, key, sums, item_picks, shared_picks, service_name) = arguments;
    let picks = |arguments: Vec<PickArguments>| arguments.into_iter().map(pick).collect::<PyResult<Vec<_>>>();
    let positions = Positions { columns, key, sums };
    Ok(RowPlan::new(item_fields, &positions, picks(item_picks)?, picks(shared_picks)?, service_name))
}

fn pick((fit, max_bytes, sources): PickArguments) -> PyResult<Pick> {
    let fit = match fit.as_str() {
        "text" => Fit::Text,
        "bool" => Fit::Bool,
        "int8" => Fit::Int8,
        "float8" => Fit::Float8,
        "jsonb" => Fit::Jsonb,
        _ => Fit::Nothing,
    };
    let sources = sources.into_iter().map(source).collect::<PyResult<_>>()?;
    Ok(Pick { sources, fit, max_bytes })
}

fn source((message, position, key): SourceArguments) -> PyResult<Source> {
    let origin = match message.as_str() {
        "span" | "log" => Origin::Item,
        "scope" => Origin::Scope,
        "resource" => Origin::Resource,
        "request" => Origin::Request,
        _ => return Err(PyValueError::new_err(format!("no such message: {message}"))),
    };
    Ok(Source { origin, position, key })
}

/// Byte strings in one buffer: a `Sequence[bytes]`.
#[pyclass(frozen, sequence, name = "Rows", module = "otel_pg_exporter._native")]
struct PyRows(Packed);

#[pymethods]
impl PyRows {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: isize) -> PyResult<Bound<'py, PyBytes>> {
        let row = position(index, self.0.len()).and_then(|index| self.0.get(index));
        row.map(|row| PyBytes::new(py, row)).ok_or_else(out_of_range)
    }

    fn __eq__(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
        equal(slf.as_any(), other)
    }
}

/// What spans contribute to `traces`: a `Sequence[SpanFacts]`.
#[pyclass(frozen, sequence, name = "Facts", module = "otel_pg_exporter._native")]
struct PyFacts(Facts);

#[pymethods]
impl PyFacts {
    fn __len__(&self) -> usize {
        self.0.spans.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: isize) -> PyResult<Bound<'py, PyAny>> {
        static SPAN_FACTS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let class = SPAN_FACTS.import(py, "otel_pg_exporter.model", "SpanFacts")?;
        let index = position(index, self.0.spans.len()).ok_or_else(out_of_range)?;
        let fact = self.0.spans.get(index).ok_or_else(out_of_range)?;
        let name = self.0.names.get(index).unwrap_or_default();
        class.call1((
            PyBytes::new(py, &fact.trace_id),
            PyBytes::new(py, &fact.span_id),
            fact.start,
            fact.end,
            fact.error,
            fact.root,
            String::from_utf8_lossy(name),
            self.0.service(fact),
            PyTuple::new(py, self.0.sums_of(index))?,
        ))
    }

    fn __eq__(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
        equal(slf.as_any(), other)
    }
}

fn position(index: isize, length: usize) -> Option<usize> {
    if index < 0 { length.checked_add_signed(index) } else { usize::try_from(index).ok() }
}

fn out_of_range() -> PyErr {
    PyIndexError::new_err("index out of range")
}

/// Compare two sequences, of whatever kind.
fn equal(one: &Bound<'_, PyAny>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
    if other.cast::<PySequence>().is_err() || one.len()? != other.len()? {
        return Ok(false);
    }
    for (one, other) in one.try_iter()?.zip(other.try_iter()?) {
        if !one?.eq(other?)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Make rows of an OTLP export request; `None` when the reference must see to it.
///
/// Returns rows, keys, facts, items, resource ids, resources, days, rejected items with their reasons, how many items
/// have each anomaly bit, and the size.
#[pyfunction]
#[pyo3(signature = (plan, body, request_id, *, now_ns, window, limits, max_batch_bytes, hold))]
#[expect(clippy::too_many_arguments, reason = "Python names them")]
fn transcode<'py>(
    py: Python<'py>,
    plan: &Bound<'py, PyPlan>,
    body: &Bound<'py, PyBytes>,
    request_id: [u8; 16],
    now_ns: u64,
    window: (i128, i128),
    limits: (usize, usize, usize),
    max_batch_bytes: usize,
    hold: Option<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyTuple>>> {
    let (earliest, latest) = window;
    let receipt = Receipt { request_id, now: now_ns, earliest, latest, max_batch_bytes };
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
    let result = py.detach(|| {
        catch_unwind(AssertUnwindSafe(|| request::transcode(plan, body, &receipt, limits, &mut tell)))
            .unwrap_or(Err(Halt::Unusual))
    });
    match (result, refused) {
        (Ok(batch), _) => to_python(py, batch).map(Some),
        (Err(_), Some(error)) => Err(error),
        (Err(_), None) => Ok(None),
    }
}

fn to_python(py: Python<'_>, batch: Batch) -> PyResult<Bound<'_, PyTuple>> {
    let resources = PyDict::new(py);
    let mut ids = Vec::with_capacity(batch.resources.len());
    for (id, row) in &batch.resources {
        let id = PyBytes::new(py, id);
        resources.set_item(&id, PyBytes::new(py, row))?;
        ids.push(id);
    }
    let resource_ids = PyList::empty(py);
    for place in batch.resource_of {
        resource_ids.append(ids.get(place).ok_or_else(out_of_range)?)?;
    }
    let reasons: Vec<_> = batch.reasons.iter().map(|reason| PyString::new(py, reason)).collect();
    let rejected = PyList::empty(py);
    for (item, place) in batch.rejected {
        rejected.append((item, reasons.get(place).ok_or_else(out_of_range)?))?;
    }
    (
        PyRows(batch.rows),
        PyRows(batch.keys),
        PyFacts(batch.facts),
        PyList::new(py, batch.items)?,
        resource_ids,
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
    use super::{PyFacts, PyPlan, PyRows, transcode};

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
        PySequence::register::<PyFacts>(module.py())
    }
}

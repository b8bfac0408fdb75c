//! The aggregates of a batch of spans.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::sequences::{Chosen, PyFacts};
use crate::traces::Traces;

/// What a batch of spans adds to `traces`.
#[pyclass(frozen, name = "Traces", module = "otel_pg_exporter._native")]
pub struct PyTraces(Traces);

#[pymethods]
impl PyTraces {
    /// Sum up the spans of these rows.
    #[new]
    fn new(py: Python<'_>, facts: &Bound<'_, PyFacts>, rows: Chosen<'_>) -> PyResult<Self> {
        let (facts, rows) = (&facts.get().0, rows.positions()?);
        Ok(Self(py.detach(|| Traces::of(facts, &rows))))
    }

    /// The ids of all traces, sorted.
    #[getter]
    fn ids<'py>(&self, py: Python<'py>) -> Vec<Bound<'py, PyBytes>> {
        self.0.ids().map(|id| PyBytes::new(py, id)).collect()
    }

    /// Return one binary array a column, of the types with these oids, for the traces with these ids.
    fn parameters<'py>(
        &self,
        py: Python<'py>,
        ids: Vec<Bound<'py, PyBytes>>,
        oids: Vec<u32>,
    ) -> Vec<Bound<'py, PyBytes>> {
        let ids: Vec<[u8; 16]> = ids.iter().filter_map(|id| id.as_bytes().try_into().ok()).collect();
        let columns = py.detach(|| self.0.parameters(&ids, &oids));
        columns.iter().map(|column| PyBytes::new(py, column)).collect()
    }
}

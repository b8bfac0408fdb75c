//! Plans, as Python hands them over.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::plan::{Fit, Origin, Pick, Plan, Positions, RowPlan, Signal, Source};

type SourceArguments = (String, usize, Option<String>);
type PickArguments = (String, Option<usize>, Vec<SourceArguments>);

/// Columns, key, sums, the item's picks, shared picks, and the position of `service_name` among the shared fields.
type RowArguments = (Vec<usize>, Vec<usize>, Vec<usize>, Vec<PickArguments>, Vec<PickArguments>, Option<usize>);

/// A compiled mapping.
#[pyclass(frozen, name = "Plan", module = "otel_pg_exporter._native")]
pub struct PyPlan(pub Plan);

#[pymethods]
impl PyPlan {
    #[new]
    fn new(signal: &str, rows: RowArguments, resources: RowArguments) -> PyResult<Self> {
        let signal = [Signal::Traces, Signal::Logs]
            .into_iter()
            .find(|known| known.name() == signal)
            .ok_or_else(|| PyValueError::new_err(format!("no such signal: {signal}")))?;
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

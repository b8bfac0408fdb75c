//! Lazy sequences: rows, keys and facts stay in Rust, and only what is asked for becomes a Python object.

use std::sync::Arc;

use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyList, PyRange, PyRangeMethods, PySlice, PyTuple};

use crate::facts::{Fact, Facts};
use crate::merge::Joined;
use crate::packed::Packed;

/// What Python puts between brackets.
#[derive(FromPyObject)]
pub enum Index<'py> {
    One(isize),
    Slice(Bound<'py, PySlice>),
}

/// Byte strings: a `Sequence[bytes]`.
#[pyclass(frozen, sequence, name = "Rows", module = "otel_pg_exporter._native")]
pub struct PyRows(pub Joined<Packed>);

impl From<Packed> for PyRows {
    fn from(packed: Packed) -> Self {
        Self(Joined::new([Arc::new(packed)], Packed::len))
    }
}

#[pymethods]
impl PyRows {
    /// Let several sequences follow one another; those that are no `Rows` are copied.
    #[staticmethod]
    fn join(parts: Vec<Bound<'_, PyAny>>) -> PyResult<Self> {
        let mut joined = Vec::new();
        for part in parts {
            if let Ok(rows) = part.cast::<Self>() {
                joined.extend(rows.get().0.parts().cloned());
                continue;
            }
            let mut packed = Packed::default();
            for row in part.try_iter()? {
                packed.push(row?.cast::<PyBytes>()?.as_bytes());
            }
            joined.push(Arc::new(packed));
        }
        Ok(Self(Joined::new(joined, Packed::len)))
    }

    /// Return one row a key, in key order, and which other rows have the key of each.
    fn order(&self, py: Python<'_>) -> (PyPositions, Vec<(usize, Vec<usize>)>) {
        let order = py.detach(|| self.0.order());
        (PyPositions(order.survivors.into()), order.doubles)
    }

    /// Put rows behind one another, in pieces of at most so many bytes; a larger row is a piece of its own.
    fn gather(&self, rows: Chosen<'_>, piece_bytes: usize) -> PyResult<PyPieces> {
        Ok(PyPieces { of: self.0.clone(), rows: rows.positions()?, piece_bytes, next: 0 })
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: Index<'py>) -> PyResult<Bound<'py, PyAny>> {
        get(py, index, self.0.len(), |index| {
            self.0.get(index).map(|row| PyBytes::new(py, row).into_any()).ok_or_else(out_of_range)
        })
    }

    fn __eq__(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
        equal(slf.as_any(), other)
    }
}

/// Positions of rows: a `Sequence[int]` without an object for each.
#[pyclass(frozen, sequence, name = "Positions", module = "otel_pg_exporter._native")]
pub struct PyPositions(Arc<[usize]>);

#[pymethods]
impl PyPositions {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: Index<'py>) -> PyResult<Bound<'py, PyAny>> {
        get(py, index, self.0.len(), |index| {
            let position = self.0.get(index).ok_or_else(out_of_range)?;
            Ok(position.into_pyobject(py)?.into_any())
        })
    }

    fn __eq__(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
        equal(slf.as_any(), other)
    }
}

/// Which rows Python means.
#[derive(FromPyObject)]
pub enum Chosen<'py> {
    Positions(Bound<'py, PyPositions>),
    Range(Bound<'py, PyRange>),
    Many(Vec<usize>),
}

impl Chosen<'_> {
    pub fn positions(self) -> PyResult<Arc<[usize]>> {
        Ok(match self {
            Self::Positions(positions) => positions.get().0.clone(),
            Self::Range(range) if range.step()? == 1 => {
                (usize::try_from(range.start()?)?..usize::try_from(range.stop()?)?).collect()
            }
            Self::Range(range) => range.extract::<Vec<usize>>()?.into(),
            Self::Many(positions) => positions.into(),
        })
    }
}

/// Rows behind one another: an `Iterator[bytes]`.
#[pyclass(name = "Pieces", module = "otel_pg_exporter._native")]
pub struct PyPieces {
    of: Joined<Packed>,
    rows: Arc<[usize]>,
    piece_bytes: usize,
    next: usize,
}

#[pymethods]
impl PyPieces {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&mut self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let rest = self.rows.get(self.next..).unwrap_or_default();
        let (count, size) = self.of.piece(rest, self.piece_bytes);
        self.next += count;
        let Some(rows) = rest.get(..count).filter(|rows| !rows.is_empty()) else { return Ok(None) };
        let piece = PyBytes::new_with(py, size, |buffer| {
            self.of.gather(rows, buffer);
            Ok(())
        })?;
        Ok(Some(piece))
    }
}

/// What spans contribute to `traces`: a `Sequence[SpanFacts]`.
#[pyclass(frozen, sequence, name = "Facts", module = "otel_pg_exporter._native")]
pub struct PyFacts(pub Joined<Facts>);

impl From<Facts> for PyFacts {
    fn from(facts: Facts) -> Self {
        Self(Joined::new([Arc::new(facts)], |facts| facts.spans.len()))
    }
}

type SpanFacts = ([u8; 16], [u8; 8], i64, i64, bool, bool, String, Option<String>, Vec<Option<i64>>);

#[pymethods]
impl PyFacts {
    /// Let several sequences follow one another; those that are no `Facts` are copied.
    #[staticmethod]
    fn join(parts: Vec<Bound<'_, PyAny>>) -> PyResult<Self> {
        let mut joined = Vec::new();
        for part in parts {
            match part.cast::<Self>() {
                Ok(facts) => joined.extend(facts.get().0.parts().cloned()),
                Err(_) => joined.push(Arc::new(copied(&part)?)),
            }
        }
        Ok(Self(Joined::new(joined, |facts| facts.spans.len())))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: Index<'py>) -> PyResult<Bound<'py, PyAny>> {
        get(py, index, self.0.len(), |index| {
            let (facts, index) = self.0.find(index).ok_or_else(out_of_range)?;
            span_facts(py, facts, index)
        })
    }

    fn __eq__(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
        equal(slf.as_any(), other)
    }
}

fn span_facts<'py>(py: Python<'py>, facts: &Facts, index: usize) -> PyResult<Bound<'py, PyAny>> {
    static SPAN_FACTS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let class = SPAN_FACTS.import(py, "otel_pg_exporter.model", "SpanFacts")?;
    let fact = facts.spans.get(index).ok_or_else(out_of_range)?;
    let sums = facts.sums_of(fact);
    class.call1((
        PyBytes::new(py, &fact.trace_id),
        PyBytes::new(py, &fact.span_id),
        fact.start,
        fact.end,
        fact.error,
        fact.root,
        String::from_utf8_lossy(facts.names.get(index).unwrap_or_default()),
        facts.service(fact),
        PyTuple::new(py, (0..facts.sum_count).map(|place| sums.get(place).copied().flatten()))?,
    ))
}

/// Copy what the reference made.
fn copied(part: &Bound<'_, PyAny>) -> PyResult<Facts> {
    let mut facts = Facts::default();
    for each in part.try_iter()? {
        let (trace_id, span_id, start, end, error, root, name, service_name, sums): SpanFacts = each?.extract()?;
        if facts.services.last() != Some(&service_name) {
            facts.services.push(service_name);
        }
        let service = facts.services.len().saturating_sub(1);
        facts.sum_count = sums.len();
        let sums = facts.keep_sums(sums.into_iter());
        facts.spans.push(Fact { trace_id, span_id, start, end, error, root, service, sums });
        facts.names.push(name.as_bytes());
    }
    Ok(facts)
}

fn get<'py>(
    py: Python<'py>,
    index: Index<'py>,
    length: usize,
    element: impl Fn(usize) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    match index {
        Index::One(index) => {
            let index = if index < 0 { length.checked_add_signed(index) } else { usize::try_from(index).ok() };
            element(index.ok_or_else(out_of_range)?)
        }
        Index::Slice(slice) => {
            let range = slice.indices(isize::try_from(length)?)?;
            let list = PyList::empty(py);
            for number in 0..range.slicelength {
                let index = range.start + isize::try_from(number)? * range.step;
                list.append(element(usize::try_from(index)?)?)?;
            }
            Ok(list.into_any())
        }
    }
}

pub fn out_of_range() -> PyErr {
    PyIndexError::new_err("index out of range")
}

/// Compare two sequences, of whatever kind.
fn equal(one: &Bound<'_, PyAny>, other: &Bound<'_, PyAny>) -> PyResult<bool> {
    if !other.len().is_ok_and(|length| one.len().is_ok_and(|own| own == length)) {
        return Ok(false);
    }
    for (one, other) in one.try_iter()?.zip(other.try_iter()?) {
        if !one?.eq(other?)? {
            return Ok(false);
        }
    }
    Ok(true)
}

//! OTLP's messages, read into structs that borrow from the request. Signals differ in their items alone.

use crate::values::{Map, Reader, Value};
use crate::wire::{Content, Fields, MAX_LEVEL, Result, Unusual, once, text};

// How deep these messages lie in a request.
const RESOURCE_LEVEL: usize = 2;
const SCOPE_LEVEL: usize = 3;
const ITEM_LEVEL: usize = 3;
const _: () = assert!(ITEM_LEVEL + 3 < MAX_LEVEL);

#[derive(Default)]
pub struct EntityRef<'a> {
    pub schema_url: &'a str,
    pub kind: &'a str,
    pub id_keys: Vec<&'a str>,
    pub description_keys: Vec<&'a str>,
}

#[derive(Default)]
pub struct Resource<'a> {
    pub attributes: Map<'a>,
    pub dropped_attributes_count: u32,
    pub entity_refs: Vec<EntityRef<'a>>,
    pub schema_url: &'a str,
    pub duplicate_key: bool,
}

#[derive(Default)]
pub struct Scope<'a> {
    pub name: &'a str,
    pub version: &'a str,
    pub attributes: Map<'a>,
    pub dropped_attributes_count: u32,
    pub schema_url: &'a str,
    pub duplicate_key: bool,
}

#[derive(Default)]
pub struct Event<'a> {
    pub time: u64,
    pub name: &'a str,
    pub attributes: Map<'a>,
    pub dropped_attributes_count: u32,
}

#[derive(Default)]
pub struct Link<'a> {
    pub trace_id: &'a [u8],
    pub span_id: &'a [u8],
    pub trace_state: &'a str,
    pub attributes: Map<'a>,
    pub dropped_attributes_count: u32,
    pub flags: u32,
}

#[derive(Default)]
pub struct Span<'a> {
    pub trace_id: &'a [u8],
    pub span_id: &'a [u8],
    pub parent_span_id: &'a [u8],
    pub trace_state: &'a str,
    pub flags: u32,
    pub name: &'a str,
    pub kind: i32,
    pub status_code: i32,
    pub status_message: &'a str,
    pub start: u64,
    pub end: u64,
    pub attributes: Map<'a>,
    pub dropped_attributes_count: u32,
    pub events: Vec<Event<'a>>,
    pub dropped_events_count: u32,
    pub links: Vec<Link<'a>>,
    pub dropped_links_count: u32,
    pub duplicate_key: bool,
}

#[derive(Default)]
pub struct LogRecord<'a> {
    pub time: u64,
    pub observed_time: u64,
    pub severity_number: i32,
    pub severity_text: &'a str,
    pub event_name: &'a str,
    pub body: Option<Value<'a>>,
    pub attributes: Map<'a>,
    pub dropped_attributes_count: u32,
    pub flags: u32,
    pub trace_id: &'a [u8],
    pub span_id: &'a [u8],
    pub duplicate_key: bool,
}

impl<'a> Resource<'a> {
    pub fn read(message: &'a [u8], schema_url: &'a str, allowance: usize) -> Result<Self> {
        let mut resource = Self { schema_url, ..Self::default() };
        let mut reader = reader(allowance);
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut reader.allowance)? {
            match field {
                (1, Content::Delimited(pair)) => reader.pair(pair, RESOURCE_LEVEL + 1, &mut resource.attributes)?,
                (2, Content::Varint(count)) => resource.dropped_attributes_count = count as u32,
                (3, Content::Delimited(reference)) => {
                    resource.entity_refs.push(EntityRef::read(reference, &mut reader.allowance)?);
                }
                (1..=3, _) => return Err(Unusual),
                _ => {}
            }
        }
        reader.finish(&mut resource.attributes);
        resource.duplicate_key = reader.duplicate_key;
        Ok(resource)
    }
}

impl<'a> EntityRef<'a> {
    fn read(message: &'a [u8], allowance: &mut usize) -> Result<Self> {
        let mut reference = Self::default();
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(allowance)? {
            match field {
                (1, Content::Delimited(content)) => reference.schema_url = text(content)?,
                (2, Content::Delimited(content)) => reference.kind = text(content)?,
                (3, Content::Delimited(content)) => reference.id_keys.push(text(content)?),
                (4, Content::Delimited(content)) => reference.description_keys.push(text(content)?),
                (1..=4, _) => return Err(Unusual),
                _ => {}
            }
        }
        Ok(reference)
    }
}

impl<'a> Scope<'a> {
    pub fn read(message: &'a [u8], schema_url: &'a str, allowance: usize) -> Result<Self> {
        let mut scope = Self { schema_url, ..Self::default() };
        let mut reader = reader(allowance);
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut reader.allowance)? {
            match field {
                (1, Content::Delimited(content)) => scope.name = text(content)?,
                (2, Content::Delimited(content)) => scope.version = text(content)?,
                (3, Content::Delimited(pair)) => reader.pair(pair, SCOPE_LEVEL + 1, &mut scope.attributes)?,
                (4, Content::Varint(count)) => scope.dropped_attributes_count = count as u32,
                (1..=4, _) => return Err(Unusual),
                _ => {}
            }
        }
        reader.finish(&mut scope.attributes);
        scope.duplicate_key = reader.duplicate_key;
        Ok(scope)
    }
}

impl<'a> Span<'a> {
    /// Read a span in the place of the one that was here before, whose buffers are used again.
    pub fn read(&mut self, message: &'a [u8], allowance: usize) -> Result<()> {
        let mut attributes = std::mem::take(&mut self.attributes);
        attributes.clear();
        *self = Self { attributes, ..Self::default() };
        let mut status = None;
        let mut reader = reader(allowance);
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut reader.allowance)? {
            match field {
                (1, Content::Delimited(content)) => self.trace_id = content,
                (2, Content::Delimited(content)) => self.span_id = content,
                (3, Content::Delimited(content)) => self.trace_state = text(content)?,
                (4, Content::Delimited(content)) => self.parent_span_id = content,
                (5, Content::Delimited(content)) => self.name = text(content)?,
                (6, Content::Varint(number)) => self.kind = number as i32,
                (7, Content::Fixed64(time)) => self.start = time,
                (8, Content::Fixed64(time)) => self.end = time,
                (9, Content::Delimited(pair)) => reader.pair(pair, ITEM_LEVEL + 1, &mut self.attributes)?,
                (10, Content::Varint(count)) => self.dropped_attributes_count = count as u32,
                (11, Content::Delimited(event)) => self.events.push(Event::read(event, &mut reader)?),
                (12, Content::Varint(count)) => self.dropped_events_count = count as u32,
                (13, Content::Delimited(link)) => self.links.push(Link::read(link, &mut reader)?),
                (14, Content::Varint(count)) => self.dropped_links_count = count as u32,
                (15, Content::Delimited(content)) => once(&mut status, content)?,
                (16, Content::Fixed32(flags)) => self.flags = flags,
                (1..=16, _) => return Err(Unusual),
                _ => {}
            }
        }
        if let Some(status) = status {
            self.read_status(status, &mut reader.allowance)?;
        }
        reader.finish(&mut self.attributes);
        self.duplicate_key = reader.duplicate_key;
        Ok(())
    }

    fn read_status(&mut self, message: &'a [u8], allowance: &mut usize) -> Result<()> {
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(allowance)? {
            match field {
                (2, Content::Delimited(content)) => self.status_message = text(content)?,
                (3, Content::Varint(number)) => self.status_code = number as i32,
                (2..=3, _) => return Err(Unusual),
                _ => {}
            }
        }
        Ok(())
    }
}

impl<'a> Event<'a> {
    fn read(message: &'a [u8], reader: &mut Reader) -> Result<Self> {
        let mut event = Self::default();
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut reader.allowance)? {
            match field {
                (1, Content::Fixed64(time)) => event.time = time,
                (2, Content::Delimited(content)) => event.name = text(content)?,
                (3, Content::Delimited(pair)) => reader.pair(pair, ITEM_LEVEL + 2, &mut event.attributes)?,
                (4, Content::Varint(count)) => event.dropped_attributes_count = count as u32,
                (1..=4, _) => return Err(Unusual),
                _ => {}
            }
        }
        reader.finish(&mut event.attributes);
        Ok(event)
    }
}

impl<'a> Link<'a> {
    fn read(message: &'a [u8], reader: &mut Reader) -> Result<Self> {
        let mut link = Self::default();
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut reader.allowance)? {
            match field {
                (1, Content::Delimited(content)) => link.trace_id = content,
                (2, Content::Delimited(content)) => link.span_id = content,
                (3, Content::Delimited(content)) => link.trace_state = text(content)?,
                (4, Content::Delimited(pair)) => reader.pair(pair, ITEM_LEVEL + 2, &mut link.attributes)?,
                (5, Content::Varint(count)) => link.dropped_attributes_count = count as u32,
                (6, Content::Fixed32(flags)) => link.flags = flags,
                (1..=6, _) => return Err(Unusual),
                _ => {}
            }
        }
        reader.finish(&mut link.attributes);
        Ok(link)
    }
}

impl<'a> LogRecord<'a> {
    /// Read a log record in the place of the one that was here before, whose buffers are used again.
    pub fn read(&mut self, message: &'a [u8], allowance: usize) -> Result<()> {
        let mut attributes = std::mem::take(&mut self.attributes);
        attributes.clear();
        *self = Self { attributes, ..Self::default() };
        let mut body = None;
        let mut reader = reader(allowance);
        let mut fields = Fields::new(message);
        while let Some(field) = fields.next(&mut reader.allowance)? {
            match field {
                (1, Content::Fixed64(time)) => self.time = time,
                (2, Content::Varint(number)) => self.severity_number = number as i32,
                (3, Content::Delimited(content)) => self.severity_text = text(content)?,
                (5, Content::Delimited(content)) => once(&mut body, content)?,
                (6, Content::Delimited(pair)) => reader.pair(pair, ITEM_LEVEL + 1, &mut self.attributes)?,
                (7, Content::Varint(count)) => self.dropped_attributes_count = count as u32,
                (8, Content::Fixed32(flags)) => self.flags = flags,
                (9, Content::Delimited(content)) => self.trace_id = content,
                (10, Content::Delimited(content)) => self.span_id = content,
                (11, Content::Fixed64(time)) => self.observed_time = time,
                (12, Content::Delimited(content)) => self.event_name = text(content)?,
                (1..=3 | 5..=12, _) => return Err(Unusual),
                _ => {}
            }
        }
        if let Some(message) = body {
            let mut value = Value::Null;
            reader.value(message, ITEM_LEVEL + 1, &mut value)?;
            self.body = Some(value).filter(|value| !matches!(value, Value::Null));
        }
        reader.finish(&mut self.attributes);
        self.duplicate_key = reader.duplicate_key;
        Ok(())
    }
}

fn reader(allowance: usize) -> Reader {
    Reader { allowance, duplicate_key: false }
}

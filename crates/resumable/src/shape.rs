//! What a value looks like to serde, as a digest or as a tree. This tells `Some(None)` from `None` and a `u8` from a
//! `u64`, which a codec's bytes may not.
//!
//! Invariant: two values have the same digest if they look the same to serde. The order of a map's entries and of a
//! sequence's members does not count (to serde a set is a sequence), and all NaNs are equal.

use std::fmt::Display;

use serde::{
    Serialize, Serializer,
    ser::{
        SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant, SerializeTuple, SerializeTupleStruct,
        SerializeTupleVariant,
    },
};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What a value is to serde.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Bool = 1,
    I8,
    I16,
    I32,
    I64,
    I128,
    U8,
    U16,
    U32,
    U64,
    U128,
    F32,
    F64,
    Char,
    Str,
    Bytes,
    None,
    Some,
    Unit,
    UnitStruct,
    UnitVariant,
    NewtypeStruct,
    NewtypeVariant,
    Seq,
    Tuple,
    TupleStruct,
    TupleVariant,
    Map,
    Struct,
    StructVariant,
}

/// Where a value stands in the one around it.
#[derive(Debug)]
pub(crate) enum Label<N> {
    Position(usize),
    Field(&'static str),
    /// An entry of a map; `is_field` if its key can only be the name of a flattened field.
    Entry {
        key: N,
        is_field: bool,
    },
    /// The value of a `Some`, a newtype or a variant.
    Inside,
}

/// The form that is built from a value.
pub(crate) trait Node: Sized {
    type Parts;

    fn leaf(kind: Kind, bytes: &[u8]) -> Self;
    /// `name` is the name of a variant.
    fn begin(kind: Kind, name: &'static str) -> Self::Parts;
    fn push(parts: &mut Self::Parts, label: Label<Self>, node: Self);
    fn end(parts: Self::Parts) -> Self;
}

/// The 64-bit digest of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Digest(pub(crate) u64);

/// The digest of a value whose parts are still being added.
#[derive(Debug)]
pub(crate) struct DigestParts {
    kind: Kind,
    count: u64,
    in_order: u64,
    in_any_order: u64,
}

impl Node for Digest {
    type Parts = DigestParts;

    fn leaf(kind: Kind, bytes: &[u8]) -> Self {
        Self(xxh3_64_with_seed(bytes, kind as u64))
    }

    fn begin(kind: Kind, name: &'static str) -> DigestParts {
        let start = xxh3_64_with_seed(name.as_bytes(), kind as u64);
        DigestParts { kind, count: 0, in_order: start, in_any_order: start }
    }

    fn push(parts: &mut DigestParts, label: Label<Self>, node: Self) {
        let part = match label {
            Label::Position(_) | Label::Inside => node.0,
            Label::Field(name) => xxh3_64_with_seed(name.as_bytes(), node.0),
            Label::Entry { key, .. } => xxh3_64_with_seed(&key.0.to_le_bytes(), node.0),
        };
        parts.count += 1;
        parts.in_order = xxh3_64_with_seed(&part.to_le_bytes(), parts.in_order);
        parts.in_any_order = parts.in_any_order.wrapping_add(xxh3_64_with_seed(&part.to_le_bytes(), 0));
    }

    fn end(parts: DigestParts) -> Self {
        let all = if parts.kind.is_unordered() { parts.in_any_order } else { parts.in_order };
        Self(xxh3_64_with_seed(&all.to_le_bytes(), parts.count))
    }
}

impl Kind {
    pub(crate) fn is_unordered(self) -> bool {
        matches!(self, Self::Seq | Self::Map)
    }

    /// Its name in an error.
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::Bool => "a bool",
            Self::I8 => "an i8",
            Self::I16 => "an i16",
            Self::I32 => "an i32",
            Self::I64 => "an i64",
            Self::I128 => "an i128",
            Self::U8 => "a u8",
            Self::U16 => "a u16",
            Self::U32 => "a u32",
            Self::U64 => "a u64",
            Self::U128 => "a u128",
            Self::F32 => "an f32",
            Self::F64 => "an f64",
            Self::Char => "a char",
            Self::Str => "a string",
            Self::Bytes => "bytes",
            Self::None => "a None",
            Self::Some => "a Some",
            Self::Unit => "a unit",
            Self::UnitStruct => "a unit struct",
            Self::UnitVariant | Self::NewtypeVariant | Self::TupleVariant | Self::StructVariant => "a variant",
            Self::NewtypeStruct => "a newtype",
            Self::Seq => "a sequence",
            Self::Tuple => "a tuple",
            Self::TupleStruct => "a tuple struct",
            Self::Map => "a map",
            Self::Struct => "a struct",
        }
    }
}

/// A value refused to be serialised.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(String);

impl serde::ser::Error for Refused {
    fn custom<T: Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

/// Builds a node from a value, serialised as human readable or not.
pub(crate) fn look<N: Node, T: Serialize + ?Sized>(value: &T, human_readable: bool) -> Result<N, Refused> {
    value.serialize(Look { human_readable, node: std::marker::PhantomData })
}

struct Look<N> {
    human_readable: bool,
    node: std::marker::PhantomData<fn() -> N>,
}

impl<N> Clone for Look<N> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<N> Copy for Look<N> {}

impl<N: Node> Look<N> {
    fn begin(self, kind: Kind, name: &'static str, keys_are_fields: bool) -> Result<Compound<N>, Refused> {
        Ok(Compound { look: self, parts: N::begin(kind, name), count: 0, key: None, keys_are_fields })
    }

    fn around<T: Serialize + ?Sized>(self, kind: Kind, name: &'static str, value: &T) -> Result<N, Refused> {
        let mut parts = N::begin(kind, name);
        N::push(&mut parts, Label::Inside, value.serialize(self)?);
        Ok(N::end(parts))
    }
}

macro_rules! numbers {
    ($($method:ident($number:ty) => $kind:ident,)*) => {
        $(fn $method(self, value: $number) -> Result<N, Refused> {
            Ok(N::leaf(Kind::$kind, &value.to_le_bytes()))
        })*
    };
}

impl<N: Node> Serializer for Look<N> {
    type Ok = N;
    type Error = Refused;
    type SerializeSeq = Compound<N>;
    type SerializeTuple = Compound<N>;
    type SerializeTupleStruct = Compound<N>;
    type SerializeTupleVariant = Compound<N>;
    type SerializeMap = Compound<N>;
    type SerializeStruct = Compound<N>;
    type SerializeStructVariant = Compound<N>;

    numbers! {
        serialize_i8(i8) => I8,
        serialize_i16(i16) => I16,
        serialize_i32(i32) => I32,
        serialize_i64(i64) => I64,
        serialize_i128(i128) => I128,
        serialize_u8(u8) => U8,
        serialize_u16(u16) => U16,
        serialize_u32(u32) => U32,
        serialize_u64(u64) => U64,
        serialize_u128(u128) => U128,
    }

    fn serialize_f32(self, value: f32) -> Result<N, Refused> {
        let value = if value.is_nan() { f32::NAN } else { value };
        Ok(N::leaf(Kind::F32, &value.to_le_bytes()))
    }

    fn serialize_f64(self, value: f64) -> Result<N, Refused> {
        let value = if value.is_nan() { f64::NAN } else { value };
        Ok(N::leaf(Kind::F64, &value.to_le_bytes()))
    }

    fn serialize_bool(self, value: bool) -> Result<N, Refused> {
        Ok(N::leaf(Kind::Bool, &[u8::from(value)]))
    }

    fn serialize_char(self, value: char) -> Result<N, Refused> {
        Ok(N::leaf(Kind::Char, &u32::from(value).to_le_bytes()))
    }

    fn serialize_str(self, value: &str) -> Result<N, Refused> {
        Ok(N::leaf(Kind::Str, value.as_bytes()))
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<N, Refused> {
        Ok(N::leaf(Kind::Bytes, value))
    }

    fn serialize_none(self) -> Result<N, Refused> {
        Ok(N::leaf(Kind::None, &[]))
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<N, Refused> {
        self.around(Kind::Some, "", value)
    }

    fn serialize_unit(self) -> Result<N, Refused> {
        Ok(N::leaf(Kind::Unit, &[]))
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<N, Refused> {
        Ok(N::leaf(Kind::UnitStruct, &[]))
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<N, Refused> {
        Ok(N::end(N::begin(Kind::UnitVariant, variant)))
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<N, Refused> {
        self.around(Kind::NewtypeStruct, "", value)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<N, Refused> {
        self.around(Kind::NewtypeVariant, variant, value)
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Compound<N>, Refused> {
        self.begin(Kind::Seq, "", false)
    }

    fn serialize_tuple(self, _: usize) -> Result<Compound<N>, Refused> {
        self.begin(Kind::Tuple, "", false)
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Compound<N>, Refused> {
        self.begin(Kind::TupleStruct, "", false)
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Compound<N>, Refused> {
        self.begin(Kind::TupleVariant, variant, false)
    }

    /// A struct with flattened fields is a map of unknown length; only in such a map are keys names and not data.
    fn serialize_map(self, length: Option<usize>) -> Result<Compound<N>, Refused> {
        self.begin(Kind::Map, "", length.is_none())
    }

    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Compound<N>, Refused> {
        self.begin(Kind::Struct, "", false)
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Compound<N>, Refused> {
        self.begin(Kind::StructVariant, variant, false)
    }

    fn is_human_readable(&self) -> bool {
        self.human_readable
    }
}

struct Compound<N: Node> {
    look: Look<N>,
    parts: N::Parts,
    count: usize,
    key: Option<N>,
    keys_are_fields: bool,
}

impl<N: Node> Compound<N> {
    fn next<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
        N::push(&mut self.parts, Label::Position(self.count), value.serialize(self.look)?);
        self.count += 1;
        Ok(())
    }

    fn field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Refused> {
        N::push(&mut self.parts, Label::Field(name), value.serialize(self.look)?);
        Ok(())
    }
}

macro_rules! in_order {
    ($($kind:ident $method:ident,)*) => {
        $(impl<N: Node> $kind for Compound<N> {
            type Ok = N;
            type Error = Refused;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
                self.next(value)
            }

            fn end(self) -> Result<N, Refused> {
                Ok(N::end(self.parts))
            }
        })*
    };
}

in_order! {
    SerializeSeq serialize_element,
    SerializeTuple serialize_element,
    SerializeTupleStruct serialize_field,
    SerializeTupleVariant serialize_field,
}

macro_rules! by_name {
    ($($kind:ident,)*) => {
        $(impl<N: Node> $kind for Compound<N> {
            type Ok = N;
            type Error = Refused;

            fn serialize_field<T: Serialize + ?Sized>(
                &mut self,
                name: &'static str,
                value: &T,
            ) -> Result<(), Refused> {
                self.field(name, value)
            }

            fn end(self) -> Result<N, Refused> {
                Ok(N::end(self.parts))
            }
        })*
    };
}

by_name! {
    SerializeStruct,
    SerializeStructVariant,
}

impl<N: Node> SerializeMap for Compound<N> {
    type Ok = N;
    type Error = Refused;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Refused> {
        self.key = Some(key.serialize(self.look)?);
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Refused> {
        let key = self.key.take().ok_or_else(|| Refused("the value of a map comes before its key".to_owned()))?;
        let label = Label::Entry { key, is_field: self.keys_are_fields };
        N::push(&mut self.parts, label, value.serialize(self.look)?);
        Ok(())
    }

    fn end(self) -> Result<N, Refused> {
        Ok(N::end(self.parts))
    }
}

//! A MessagePack value as JSON.
//!
//! Invariant: nothing is lost silently: a NaN becomes text, and a map whose keys are not text becomes a list of pairs.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor},
    ser::SerializeMap,
};

/// Any MessagePack value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Single(f32),
    Double(f64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Value>),
    Map(Vec<(Value, Value)>),
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Any)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Signed(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_f32<E>(self, value: f32) -> Result<Value, E> {
        Ok(Value::Single(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Double(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_bytes<E>(self, value: &[u8]) -> Result<Value, E> {
        Ok(Value::Bytes(value.to_vec()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(Self)
    }

    /// A MessagePack extension: its number, and its bytes.
    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(Self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(member) = members.next_element()? {
            list.push(member);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Value::Map(map))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<Value, A::Error> {
        let (_, content): (Value, A::Variant) = variant.variant()?;
        content.unit_variant()?;
        Err(Error::custom("a value that describes itself has no variants"))
    }
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Unsigned(value) => serializer.serialize_u64(*value),
            Self::Signed(value) => serializer.serialize_i64(*value),
            Self::Single(value) if value.is_finite() => serializer.serialize_f32(*value),
            Self::Single(value) => serializer.collect_str(value),
            Self::Double(value) if value.is_finite() => serializer.serialize_f64(*value),
            Self::Double(value) => serializer.collect_str(value),
            Self::Text(value) => serializer.serialize_str(value),
            Self::Bytes(value) => serializer.collect_seq(value),
            Self::List(members) => serializer.collect_seq(members),
            Self::Map(entries) if entries.iter().all(|(key, _)| key.is_name()) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for (key, value) in entries {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
            Self::Map(entries) => serializer.collect_seq(entries),
        }
    }
}

impl Value {
    /// Whether it can be a JSON key: text as it is, and a whole number as text.
    fn is_name(&self) -> bool {
        matches!(self, Self::Text(_) | Self::Unsigned(_) | Self::Signed(_))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::codec::Codec;

    fn json<T: Serialize>(value: &T) -> String {
        let mut bytes = Vec::new();
        Codec::MessagePack.encode(value, &mut bytes).unwrap();
        serde_json::to_string(&Codec::MessagePack.decode::<Value>(&bytes).unwrap()).unwrap()
    }

    #[test]
    fn every_value_has_a_form_in_json() {
        assert_eq!(
            json(&(1, -1, u64::MAX, 0.1f32, 1.5, true, (), "ß\n")),
            r#"[1,-1,18446744073709551615,0.1,1.5,true,null,"ß\n"]"#
        );
        assert_eq!(json(&[f64::NAN, f64::INFINITY]), r#"["NaN","inf"]"#);
        assert_eq!(json(&BTreeMap::from([(1u8, "a"), (2, "b")])), r#"{"1":"a","2":"b"}"#);
        assert_eq!(json(&BTreeMap::from([((1u8, 2u8), "a")])), r#"[[[1,2],"a"]]"#);
        assert_eq!(json(&BTreeMap::from([(Some("a"), Ok::<u8, String>(1)), (None, Err("e".to_owned()))])), {
            r#"[[null,{"Err":"e"}],["a",{"Ok":1}]]"#
        });
        assert_eq!(json(&u128::from(u64::MAX)), "[0,0,0,0,0,0,0,0,255,255,255,255,255,255,255,255]");
    }
}

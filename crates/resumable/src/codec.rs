//! How results become payload bytes.
//!
//! Invariant: the codec's number in a file never changes its meaning.

use serde::{Serialize, de::DeserializeOwned};

use crate::item::BoxError;

/// How results are written into the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Codec {
    /// MessagePack with named fields (the default). It describes itself, so that `untagged`, `flatten`,
    /// `skip_serializing_if` and `serde_json::Value` come back as they were, and a field with a default can be added.
    #[default]
    MessagePack,
    /// Postcard: the smallest, for types of a fixed shape. Those serde attributes do not work with it, and a changed
    /// struct cannot be read.
    #[cfg(feature = "postcard")]
    Postcard,
}

impl Codec {
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::MessagePack => 1,
            #[cfg(feature = "postcard")]
            Self::Postcard => 2,
        }
    }

    #[cfg(feature = "postgres")]
    pub(crate) fn of_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::MessagePack),
            #[cfg(feature = "postcard")]
            2 => Some(Self::Postcard),
            _ => None,
        }
    }

    pub(crate) fn name_of(number: u8) -> String {
        match number {
            1 => "MessagePack".to_owned(),
            2 => "postcard".to_owned(),
            other => format!("number {other}"),
        }
    }

    /// Appends the encoded value to `bytes`.
    #[inline]
    pub(crate) fn encode<T: Serialize + ?Sized>(self, value: &T, bytes: &mut Vec<u8>) -> Result<(), BoxError> {
        match self {
            Self::MessagePack => rmp_serde::encode::write_named(bytes, value)?,
            #[cfg(feature = "postcard")]
            Self::Postcard => *bytes = postcard::to_extend(value, std::mem::take(bytes))?,
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn decode<T: DeserializeOwned>(self, bytes: &[u8]) -> Result<T, BoxError> {
        match self {
            Self::MessagePack => Ok(rmp_serde::from_slice(bytes)?),
            #[cfg(feature = "postcard")]
            Self::Postcard => Ok(postcard::from_bytes(bytes)?),
        }
    }
}

//! How results become payload bytes.
//!
//! Invariant: a codec's number in a file never changes its meaning, and encoder and decoder tell a type the same about
//! whether the format is human readable.

use rmp_serde::config::{DefaultConfig, HumanReadableConfig};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

use crate::item::BoxError;

/// How results are written into the checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Codec {
    /// MessagePack with named fields, human readable (the default). It describes itself, so that `untagged`, `flatten`,
    /// `skip_serializing_if` and `serde_json::Value` come back as they were, and a field with a default can be added.
    /// Types with a human-readable form, such as an `IpAddr` or a date, are written in that form.
    ///
    /// Like JSON, it cannot tell `Some(None)` or `Some(())` from `None`, and serde itself cannot restore a `u128`
    /// behind `untagged`, `flatten` or `tag`: such a result is refused with [`TaskError::RoundTrip`].
    ///
    /// [`TaskError::RoundTrip`]: crate::TaskError::RoundTrip
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
            Self::MessagePack => {
                value.serialize(&mut rmp_serde::Serializer::new(bytes).with_struct_map().with_human_readable())?;
            }
            #[cfg(feature = "postcard")]
            Self::Postcard => *bytes = postcard::to_extend(value, std::mem::take(bytes))?,
        }
        Ok(())
    }

    #[inline]
    pub(crate) fn decode<T: DeserializeOwned>(self, bytes: &[u8]) -> Result<T, BoxError> {
        match self {
            Self::MessagePack => Ok(T::deserialize(&mut message_pack(bytes))?),
            #[cfg(feature = "postcard")]
            Self::Postcard => match postcard::take_from_bytes(bytes)? {
                (value, []) => Ok(value),
                // Another type wrote these bytes: a value that happens to fit their beginning is not the right one.
                (_, rest) => Err(format!("{} bytes are left over", rest.len()).into()),
            },
        }
    }

    /// Returns the path of the field at which a value cannot be read, as far as it can be told.
    #[cold]
    pub(crate) fn path_of_failure<T: DeserializeOwned>(self, bytes: &[u8]) -> String {
        let path = match self {
            Self::MessagePack => path_in::<T, _>(&mut message_pack(bytes)),
            #[cfg(feature = "postcard")]
            Self::Postcard => path_in::<T, _>(&mut postcard::Deserializer::from_bytes(bytes)),
        };
        path.unwrap_or_default()
    }

    /// Whether types with a human-readable form are written in that form.
    pub(crate) fn is_human_readable(self) -> bool {
        match self {
            Self::MessagePack => true,
            #[cfg(feature = "postcard")]
            Self::Postcard => false,
        }
    }
}

type MessagePack<'a> =
    rmp_serde::Deserializer<rmp_serde::decode::ReadRefReader<'a, [u8]>, HumanReadableConfig<DefaultConfig>>;

/// Serde reads buffered values (for `untagged`, `flatten` and `tag`) back as human readable whatever the codec is, so
/// they must be written as human readable.
fn message_pack(bytes: &[u8]) -> MessagePack<'_> {
    rmp_serde::Deserializer::from_read_ref(bytes).with_human_readable()
}

fn path_in<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Option<String> {
    let failed = serde_path_to_error::deserialize::<D, T>(from).err()?;
    let path = failed.path();
    let is_known = path.iter().next().is_some();
    is_known.then(|| format!(".{path}").replace(".[", "["))
}

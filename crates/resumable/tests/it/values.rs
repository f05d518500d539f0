//! A recorded value comes back unchanged, or is refused when the first one is recorded.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Debug,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use cancel_safe_resumable::{Builder, Codec, FileStore, ResumableTask, TaskError, map};
use futures_util::StreamExt;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

use crate::support::checkpoint;

/// What becomes of a shape.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Back,
    /// It would come back as another value; the first field that differs.
    Other(&'static str),
    /// It can be written but not read; the field.
    Unread(&'static str),
    Unwritten,
}
use Fate::{Back, Other, Unread, Unwritten};

fn job<R: Send>(path: &Path, codec: Codec) -> Builder<u8, R> {
    ResumableTask::<u8>::builder::<R>("values").store(FileStore::at(path)).codec(codec)
}

/// Records a value, and if that succeeds restores it.
async fn fate_of<R>(name: &str, value: R, codec: Codec) -> Fate
where
    R: Serialize + DeserializeOwned + Clone + PartialEq + Debug + Send + Sync + 'static,
{
    let (_dir, path) = checkpoint();
    let work = |value: R| {
        move |_, _| {
            let value = value.clone();
            async move { Ok(value) }
        }
    };
    let mut fate = Back;
    for _ in 0..2 {
        let ended = job(&path, codec).stream([0], work(value.clone())).finish().await;
        let Err(error) = ended else { break };
        let message = error.to_string();
        assert!(error.is_codec() && message.contains(std::any::type_name::<R>()), "{name}: {message}");
        // A refused value was not recorded: the second round is refused like the first.
        fate = match error {
            TaskError::RoundTrip { index: 0, path, .. } => Other(path.leak()),
            TaskError::Codec { index: 0, action: "read back", path, recorded_as: None, .. } => Unread(path.leak()),
            TaskError::Codec { index: 0, action: "written", .. } => Unwritten,
            other => panic!("{name}: {other}"),
        };
    }
    if fate == Back {
        let done = job(&path, codec).stream([0], work(value.clone())).next().await.unwrap();
        assert!(done.restored, "{name}");
        assert_eq!(done.result.unwrap(), value, "{name}");
    }
    fate
}

async fn shape<R>(name: &str, value: R, message_pack: Fate, postcard: Fate)
where
    R: Serialize + DeserializeOwned + Clone + PartialEq + Debug + Send + Sync + 'static,
{
    assert_eq!(fate_of(name, value.clone(), Codec::MessagePack).await, message_pack, "{name} as MessagePack");
    #[cfg(feature = "postcard")]
    assert_eq!(fate_of(name, value, Codec::Postcard).await, postcard, "{name} as postcard");
    #[cfg(not(feature = "postcard"))]
    let _ = postcard;
}

macro_rules! shapes {
    ($($(#[$attribute:meta])* $kind:ident $name:ident $body:tt)*) => {
        $(#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)] $(#[$attribute])* $kind $name $body)*
    };
}

shapes! {
    #[serde(untagged)] enum Host { Ip(IpAddr), Name(String) }
    struct Address { ip: IpAddr }
    struct Flat { port: u16, #[serde(flatten)] inner: Address }
    #[serde(tag = "kind")] enum Tagged { Ip { ip: IpAddr }, None }
    #[serde(tag = "kind", content = "value")] enum Adjacent { Ip(IpAddr), None }
    #[serde(untagged)] enum Id { Number(u128), Name(String) }
    struct Wide { wide: u128 }
    struct FlatWide { a: u8, #[serde(flatten)] inner: Wide }
    #[serde(tag = "kind")] enum TaggedWide { Wide { wide: u128 } }
    struct Opt { a: Option<Option<u8>> }
    struct Nested { hosts: Vec<Opt> }
    struct Sparse { #[serde(skip_serializing_if = "Option::is_none", default)] note: Option<String>, after: u8 }
    enum Kinds { Unit, Newtype(u8), Tuple(u8, String), Struct { a: Option<u8> } }
    #[serde(untagged)] enum Float { Narrow(f32), Wide(f64) }
    #[serde(untagged)] enum Int { Narrow(u8), Wide(u64) }
    struct Renamed { #[serde(rename(serialize = "a", deserialize = "b"))] field: u8 }
    #[serde(transparent)] struct Transparent { inner: Vec<u8> }
    struct Lower { name: Lowered }
}
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Marker;

/// Compares as the same if both are NaN.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Float64(f64);

impl PartialEq for Float64 {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0 && self.0.is_sign_negative() == other.0.is_sign_negative()
            || self.0.is_nan() && other.0.is_nan()
    }
}

/// Serialised as bytes.
#[derive(Clone, Debug, PartialEq)]
struct Blob(Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Blob;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }
        }
        deserializer.deserialize_bytes(Visitor)
    }
}

/// Comes back in lower case.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Lowered(String);

impl<'de> Deserialize<'de> for Lowered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(String::deserialize(deserializer)?.to_lowercase()))
    }
}

fn ip() -> IpAddr {
    "10.0.0.1".parse().unwrap()
}

#[tokio::test]
async fn plain_shapes_come_back_with_both_codecs() {
    shape("u128", u128::MAX, Back, Back).await;
    shape("i128", i128::MIN, Back, Back).await;
    shape("NaN", Float64(f64::NAN), Back, Back).await;
    shape("minus zero", Float64(-0.0), Back, Back).await;
    shape("char", ['ß', '\0'], Back, Back).await;
    shape("unit struct", Marker, Back, Back).await;
    shape("text with a NUL", "a\0b".to_owned(), Back, Back).await;
    shape("bytes", Blob(vec![0, 255, 7]), Back, Back).await;
    shape("transparent", Transparent { inner: vec![1, 200] }, Back, Back).await;
    shape("array of bytes", [200u8; 32], Back, Back).await;
    shape("address", ip(), Back, Back).await;
    shape("socket", SocketAddr::new("::1".parse().unwrap(), 80), Back, Back).await;
    shape("duration", Duration::new(3, 999_999_999), Back, Back).await;
    shape("time", SystemTime::UNIX_EPOCH + Duration::from_nanos(1), Back, Back).await;
    shape("path", PathBuf::from("/a/ß"), Back, Back).await;
    shape("result", [Ok(1u8), Err("no".to_owned())], Back, Back).await;
    shape("map", BTreeMap::from([(7u64, vec![Some('ß'), None]), (u64::MAX, vec![])]), Back, Back).await;
    let kinds = vec![
        Kinds::Unit,
        Kinds::Newtype(1),
        Kinds::Tuple(2, "b".to_owned()),
        Kinds::Struct { a: Some(3) },
        Kinds::Struct { a: None },
    ];
    shape("every kind of variant", kinds, Back, Back).await;
    let hashed: HashMap<String, HashSet<u32>> = (0..50).map(|x| (x.to_string(), (0..x).collect())).collect();
    shape("hash map of hash sets", hashed, Back, Back).await;
}

#[tokio::test]
async fn shapes_that_describe_themselves_come_back_as_message_pack() {
    shape("untagged address", Host::Ip(ip()), Back, Unread("")).await;
    shape("untagged name", Host::Name("10.0.0.x".to_owned()), Back, Unread("")).await;
    shape("flattened address", Flat { port: 1, inner: Address { ip: ip() } }, Back, Unwritten).await;
    shape("tagged address", Tagged::Ip { ip: ip() }, Back, Unread("")).await;
    shape("tagged unit", Tagged::None, Back, Unread("")).await;
    shape("adjacently tagged address", Adjacent::Ip(ip()), Back, Unread("[0]")).await;
    shape("skipped field", Sparse { note: None, after: 7 }, Back, Unread("[0]")).await;
    let value = serde_json::json!({ "list": [1, -1, 2.5, 2.0, null, "s"], "big": u64::MAX, "low": i64::MIN });
    shape("json", value, Back, Unread("")).await;
}

#[tokio::test]
async fn shapes_that_would_come_back_otherwise_are_refused_at_the_first_item() {
    shape("untagged u128", Id::Number(65), Other(""), Unread("")).await;
    shape("untagged u128 that is no text", Id::Number(u128::MAX), Unread(""), Unread("")).await;
    shape("flattened u128", FlatWide { a: 1, inner: Wide { wide: 1 } }, Unread(""), Unwritten).await;
    shape("tagged u128", TaggedWide::Wide { wide: 1 }, Unread(""), Unread("")).await;
    shape("Some(None)", Opt { a: Some(None) }, Other(".a"), Back).await;
    shape("Some(Some)", Opt { a: Some(Some(1)) }, Back, Back).await;
    shape("Some(())", Some(()), Other(""), Back).await;
    let hosts = vec![Opt { a: None }, Opt { a: Some(Some(1)) }, Opt { a: Some(None) }];
    shape("Some(None) deep inside", Nested { hosts }, Other(".hosts[2].a"), Back).await;
    shape("untagged f64", Float::Wide(0.5), Other(""), Unread("")).await;
    shape("untagged u64", Int::Wide(5), Other(""), Unread("")).await;
    shape("renamed one way", Renamed { field: 1 }, Unread(""), Back).await;
    shape("made lower", Lower { name: Lowered("ABC".to_owned()) }, Other(".name"), Other(".name")).await;
    shape("already lower", Lower { name: Lowered("abc".to_owned()) }, Back, Back).await;
}

#[tokio::test]
async fn an_item_that_would_reach_its_function_as_another_value_is_refused() {
    let (_dir, path) = checkpoint();
    let items = [Some(Some(1u8)), None, Some(None)];
    let error = map(&path, items, |item| async move { item.is_some() }).await.unwrap_err();
    assert!(matches!(error, TaskError::RoundTrip { index: 2, .. }), "{error}");
    assert!(
        error.to_string().starts_with("item 2: a `core::option::Option<core::option::Option<u8>>` does not come back")
    );
}

mod before {
    #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    pub(super) struct Page {
        pub(super) length: u64,
    }
}
mod after {
    #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    pub(super) struct Document {
        pub(super) length: u64,
        #[serde(default)]
        pub(super) title: Option<String>,
    }
    #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    pub(super) struct Changed {
        pub(super) length: Vec<String>,
    }
}

#[tokio::test]
async fn a_result_type_that_was_moved_renamed_or_widened_keeps_its_file() {
    let (_dir, path) = checkpoint();
    let run = job(&path, Codec::MessagePack).stream([0], |_, _| async { Ok(before::Page { length: 7 }) });
    run.finish().await.unwrap();
    let mut run = job(&path, Codec::MessagePack).stream([0], |_, _| async { unreachable!() });
    let done = run.next().await.unwrap();
    assert_eq!(done.result, Ok(after::Document { length: 7, title: None }));
    assert_eq!(run.finish().await.unwrap().restored, 1);
}

#[tokio::test]
async fn a_result_type_that_cannot_be_read_any_more_is_named_and_nothing_is_overwritten() {
    let (_dir, path) = checkpoint();
    let run =
        job(&path, Codec::MessagePack).version("v7").stream([0, 1], |_, _| async { Ok(before::Page { length: 7 }) });
    run.finish().await.unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let changed = || job::<after::Changed>(&path, Codec::MessagePack).version("v7");
    let error = changed().stream([0, 1, 2], |_, _| async { unreachable!() }).finish().await.unwrap_err();
    assert_eq!(bytes, std::fs::read(&path).unwrap());
    assert!(error.is_codec());
    let message = error.to_string();
    for part in ["item 0", "after::Changed`", "at `.length`", "before::Page`", "version `v7`", "`.version(…)`"] {
        assert!(message.contains(part), "{part} in {message}");
    }
    let TaskError::Codec { action: "read back", version: Some(version), .. } = error else { panic!("{message}") };
    assert_eq!(&*version, "v7");
}

#[cfg(feature = "postcard")]
#[tokio::test]
async fn postcard_that_fits_only_the_beginning_of_a_result_is_not_read_as_one() {
    let (_dir, path) = checkpoint();
    job(&path, Codec::Postcard).stream([0], |_, _| async { Ok((7u64, 8u64)) }).finish().await.unwrap();
    let error = job::<u64>(&path, Codec::Postcard).stream([0], |_, _| async { unreachable!() }).finish().await;
    assert!(matches!(error, Err(TaskError::Codec { index: 0, action: "read back", .. })), "{error:?}");
}

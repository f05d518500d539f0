//! Extended attributes, where the system has them.
//!
//! Invariant: an attribute that the new file already has is not set again, and an access control list is never copied
//! without the mode to which it belongs.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
#[cfg(any(target_os = "linux", target_os = "android"))]
use std::{
    ffi::{OsStr, OsString},
    os::fd::AsRawFd,
};

#[cfg(any(target_os = "linux", target_os = "android"))]
use rustix::fs::lgetxattr;
use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fsetxattr};
use rustix::io::Errno;

#[cfg(any(target_os = "linux", target_os = "android"))]
use super::{Entry, Guests, acl::List};

/// The kernel's own limit for one value and for the list of names.
const LIMIT_BYTES: usize = 64 << 10;
/// Room for an access control list of some 120 entries. The kernel allocates and clears as much memory as it is
/// offered, and at the limit that takes longer than reading a list.
#[cfg(any(target_os = "linux", target_os = "android"))]
const USUAL_BYTES: usize = 1 << 10;

/// It belongs to the mode, so it is not copied like other attributes.
const ACCESS_LIST: &CStr = c"system.posix_acl_access";

/// Copies every attribute of `from` that `to` does not already have with the same value, except the access control
/// list.
pub(super) fn copy(from: &File, to: &File) -> io::Result<()> {
    for name in names(from)?.into_iter().filter(|name| **name != *ACCESS_LIST) {
        // The attribute has vanished since it was listed.
        let Some(value) = get(from, &name)? else { continue };
        // Security labels are often set by the kernel itself, and setting them again may need a privilege.
        if get(to, &name)?.as_ref() != Some(&value) {
            fsetxattr(to, &*name, &value, XattrFlags::empty())?;
        }
    }
    Ok(())
}

/// Reads the access control list of the file `name` in `dir`, whose handle is `handle`, without following a symlink.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(super) fn guests(dir: &super::Dir, handle: &File, name: &OsStr) -> io::Result<Guests> {
    match read_guests(dir, handle, name, &mut [0; USUAL_BYTES]) {
        Err(error) if error.raw_os_error() == Some(Errno::RANGE.raw_os_error()) => {
            read_guests(dir, handle, name, &mut vec![0; LIMIT_BYTES])
        }
        other => other,
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn read_guests(dir: &super::Dir, handle: &File, name: &OsStr, value: &mut [u8]) -> io::Result<Guests> {
    // Before Linux 6.13 there is no such call below a handle, but /proc has a name for the handle. Reading the list
    // does not require permission to read the file.
    let mut path = OsString::from(format!("/proc/self/fd/{}/", handle.as_raw_fd()));
    path.push(name);
    let read = match lgetxattr(&*path, ACCESS_LIST, &mut *value) {
        // The file is gone, or there is no /proc, or it is not accessible.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS | Errno::PERM) => match dir.read(name) {
            Ok(file) => fgetxattr(&file, ACCESS_LIST, &mut *value),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Guests::Unknown),
            Err(error) => return Err(error),
        },
        other => other,
    };
    match read {
        Ok(length) => match List::parse(&value[..length]) {
            Some(list) => Ok(Guests::Listed(list)),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "its access control list is not understood")),
        },
        Err(Errno::NODATA) => Ok(Guests::None),
        Err(Errno::NOTSUP) => Ok(Guests::Unsupported),
        Err(errno) => Err(errno.into()),
    }
}

/// Gives `file`, which so far grants access only to its owner, exactly these permission bits and this list; `now` are
/// its present bits.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn set_access(file: &File, now: u32, mode: u32, guests: &Guests) -> io::Result<()> {
    // If the file had a list, its mode's group bits are the mask. Using them as the group's bits would widen the
    // group's access.
    let mode = if *guests == Guests::Unknown { mode & 0o7700 } else { mode };
    // One call sets list and bits, so that the new bits are never combined with the list from the directory.
    let list = match guests {
        Guests::Unsupported => return super::change_mode(file, now, mode),
        Guests::None | Guests::Unknown => List::of_mode(mode),
        Guests::Listed(list) => list.clone(),
    };
    match fsetxattr(file, ACCESS_LIST, &list.to_bytes(), XattrFlags::empty()) {
        Ok(()) if mode & 0o7000 == 0 => Ok(()),
        // A list does not include the set-ID bits and the sticky bit. The other nine bits are now as the list says.
        Ok(()) => super::set_mode(file, Entry::of(file)?.mode & 0o777 | mode & 0o7000),
        Err(Errno::NOTSUP) if !matches!(guests, Guests::Listed(_)) => super::change_mode(file, now, mode),
        Err(errno) => Err(errno.into()),
    }
}

fn names(file: &File) -> io::Result<Vec<CString>> {
    let mut list = vec![0; LIMIT_BYTES];
    let length = match flistxattr(file, &mut list[..]) {
        Ok(length) => length,
        // A file system without attributes has none to keep.
        Err(Errno::NOTSUP) => 0,
        Err(errno) => return Err(errno.into()),
    };
    let names = list[..length].split_inclusive(|&byte| byte == 0);
    Ok(names.filter_map(|name| CStr::from_bytes_with_nul(name).ok()).map(CStr::to_owned).collect())
}

fn get(file: &File, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; LIMIT_BYTES];
    match fgetxattr(file, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        #[cfg(any(target_os = "linux", target_os = "android"))]
        Err(Errno::NODATA) => Ok(None),
        #[cfg(target_vendor = "apple")]
        Err(Errno::NOATTR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;

    /// A file that grants access only to its owner.
    fn fresh() -> File {
        tempfile::NamedTempFile::new().expect("the temporary directory has room").into_file()
    }

    fn mode_after(mode: u32, guests: &Guests) -> u32 {
        let file = fresh();
        set_access(&file, 0o600, mode, guests).expect("the file is ours");
        Entry::of(&file).expect("it is open").mode
    }

    #[test]
    fn bits_that_may_have_been_a_mask_are_granted_to_nobody_but_the_owner() {
        assert_eq!(mode_after(0o660, &Guests::Unknown), 0o600);
        assert_eq!(mode_after(0o4754, &Guests::Unknown), 0o4700);
        assert_eq!(mode_after(0o664, &Guests::None), 0o664);
        assert_eq!(mode_after(0o664, &Guests::Unsupported), 0o664);
    }

    #[test]
    fn a_list_that_is_longer_than_usual_is_read_whole() {
        let dir = tempfile::tempdir().expect("the temporary directory has room");
        let file = File::create(dir.path().join("file")).expect("the directory is ours");
        let entry = |tag: u16, id: u32| [&tag.to_le_bytes()[..], &4_u16.to_le_bytes(), &id.to_le_bytes()].concat();
        let named = (0..200).map(|number| entry(0x02, 1000 + number));
        let last = [(0x04, u32::MAX), (0x10, u32::MAX), (0x20, u32::MAX)].map(|(tag, id)| entry(tag, id));
        let all = [2_u32.to_le_bytes().to_vec(), entry(0x01, u32::MAX)].into_iter().chain(named).chain(last);
        let list = all.collect::<Vec<_>>().concat();
        assert!(list.len() > USUAL_BYTES);
        // There may be no lists here.
        let Ok(()) = fsetxattr(&file, ACCESS_LIST, &list, XattrFlags::empty()) else { return };
        let opened = super::super::Dir::open(dir.path()).expect("it is there");
        let wanted = List::parse(&list).expect("it is a list");
        assert_eq!(opened.guests("file".as_ref()).expect("it can be read"), Guests::Listed(wanted));
    }

    #[test]
    fn of_a_file_that_has_gone_nobody_knows_who_might_use_it() {
        let dir = tempfile::tempdir().expect("the temporary directory has room");
        let dir = super::super::Dir::open(dir.path()).expect("it is there");
        assert_eq!(dir.guests("gone".as_ref()).expect("that is no error"), Guests::Unknown);
    }

    #[test]
    fn bits_that_a_file_without_lists_has_are_not_set_again() {
        let file = fresh();
        // The file has another mode than claimed, so that setting it would show.
        set_access(&file, 0o640, 0o640, &Guests::Unsupported).expect("there is nothing to do");
        assert_eq!(Entry::of(&file).expect("it is open").mode, 0o600);
    }
}

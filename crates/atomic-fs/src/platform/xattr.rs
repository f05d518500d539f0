//! Extended attributes, where the system has them.
//!
//! Invariant: an attribute that the new file already has is not set again.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;

use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};
use rustix::io::Errno;

/// The kernel's own limit for one value and for the list of names.
const LIMIT_BYTES: usize = 64 << 10;

/// What a directory may give to each new file in it, though the replaced file has none.
const ACCESS_LIST: &CStr = c"system.posix_acl_access";

/// Copies every attribute of `from` that `to` does not already have with the same value.
pub(super) fn copy(from: &File, to: &File) -> io::Result<()> {
    let names = names(from)?;
    if !names.iter().any(|name| **name == *ACCESS_LIST) && has_access_list(to)? {
        fremovexattr(to, ACCESS_LIST)?;
    }
    for name in names {
        // An attribute that vanished since it was listed is not there to be kept.
        let Some(value) = get(from, &name)? else { continue };
        // Security labels are often set by the kernel itself, and setting them again may need a privilege.
        if get(to, &name)?.as_ref() != Some(&value) {
            fsetxattr(to, &*name, &value, XattrFlags::empty())?;
        }
    }
    Ok(())
}

fn has_access_list(file: &File) -> io::Result<bool> {
    match get(file, ACCESS_LIST) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
        other => Ok(other?.is_some()),
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

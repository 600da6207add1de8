//! Files and folders that appear whole under their name, or not at all.
//!
//! [`StagedDir`] collects files in a temporary folder beside the target and renames it once at the
//! end; [`StagedFile`] does so with one file. A lock on a sidecar file tells what is in use from
//! what a killed process left.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// How often a lock is tried whose file others remove at the same time.
const LOCK_TRIES: usize = 100;

/// What to do when the target is already there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfExists {
    Refuse,
    Replace,
}

/// A folder under construction: `.<name>.tmp-<pid>-<n>` beside its target until [`commit`].
///
/// [`commit`]: StagedDir::commit
pub struct StagedDir {
    target: PathBuf,
    temp: PathBuf,
    if_exists: IfExists,
    // Held until the temporary folder is gone or renamed.
    lock: SidecarLock,
}

impl StagedDir {
    /// Starts the folder that [`commit`](StagedDir::commit) will put at `target`, and removes what
    /// killed processes left there.
    pub fn create(target: &Path, if_exists: IfExists) -> Result<StagedDir, Error> {
        let (parent, name) = split_target(target)?;
        if if_exists == IfExists::Refuse {
            refuse_existing(target)?;
        }
        fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, e))?;
        remove_stale(&parent, &temp_prefix(&name))?;
        let (temp, lock) = reserve_temp(&parent, &name)?;
        fs::create_dir(&temp).map_err(|e| Error::io(&temp, e))?;
        Ok(StagedDir { target: target.to_owned(), temp, if_exists, lock })
    }

    /// The temporary folder, to put files in.
    pub fn path(&self) -> &Path {
        &self.temp
    }

    /// Makes every file durable and gives the folder its name.
    pub fn commit(self) -> Result<(), Error> {
        sync_tree(&self.temp)?;
        match self.if_exists {
            IfExists::Refuse => {
                refuse_existing(&self.target)?;
                rename(&self.temp, &self.target)?;
            }
            IfExists::Replace => self.replace()?,
        }
        let (parent, _) = split_target(&self.target)?;
        sync_dir(&parent)
    }

    /// New and old change places in one step, so that the target is always one of them, whole; then
    /// the old one goes. Where the file system cannot do that the old one moves aside first, and
    /// [`remove_stale`] moves it back if the process is killed before the new one has its name.
    fn replace(&self) -> Result<(), Error> {
        if self.target.symlink_metadata().is_err() {
            return rename(&self.temp, &self.target);
        }
        let (parent, _) = split_target(&self.target)?;
        if exchange(&self.temp, &self.target)? {
            // The old folder may go only when the new one's name is sure to last.
            sync_dir(&parent)?;
            return remove_any(&self.temp);
        }
        let old = aside(&self.temp);
        rename(&self.target, &old)?;
        if let Err(error) = rename(&self.temp, &self.target) {
            rename(&old, &self.target)?;
            return Err(error);
        }
        sync_dir(&parent)?;
        remove_any(&old)
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        // After a commit the temporary name is gone. On the way out of an error there is nobody
        // left to tell, and the next run removes what remains.
        let _ = remove_any(&self.temp);
        let _ = fs::remove_file(&self.lock.path);
    }
}

/// A file under construction, as [`StagedDir`] is for folders.
pub struct StagedFile {
    target: PathBuf,
    temp: PathBuf,
    if_exists: IfExists,
    // Held until the temporary file is gone or renamed.
    lock: SidecarLock,
}

impl StagedFile {
    /// Reserves the name of the temporary file, which the caller creates, and removes what killed
    /// processes left there.
    pub fn create(target: &Path, if_exists: IfExists) -> Result<StagedFile, Error> {
        if if_exists == IfExists::Refuse {
            refuse_existing(target)?;
        }
        if target.is_dir() {
            return Err(Error::Request(format!(
                "{}: is a folder; give the name of a file",
                target.display()
            )));
        }
        let (parent, name) = split_target(target)?;
        fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, e))?;
        remove_stale(&parent, &temp_prefix(&name))?;
        let (temp, lock) = reserve_temp(&parent, &name)?;
        Ok(StagedFile { target: target.to_owned(), temp, if_exists, lock })
    }

    /// The temporary file.
    pub fn path(&self) -> &Path {
        &self.temp
    }

    /// Gives the file, which is whole and durable, its name.
    pub fn commit(self) -> Result<(), Error> {
        if self.if_exists == IfExists::Refuse {
            refuse_existing(&self.target)?;
        }
        rename(&self.temp, &self.target)?;
        let (parent, _) = split_target(&self.target)?;
        sync_dir(&parent)
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        // As for a folder: after a commit the temporary name is gone.
        let _ = fs::remove_file(&self.temp);
        let _ = fs::remove_file(&self.lock.path);
    }
}

/// Writes one small file so that `path` holds either its old or its whole new content.
pub fn write_file(path: &Path, content: &[u8], if_exists: IfExists) -> Result<(), Error> {
    let staged = StagedFile::create(path, if_exists)?;
    write_durable(staged.path(), content)?;
    staged.commit()
}

/// Creates a new file with `content` and makes it durable; a full disk says how much was needed.
pub fn write_durable(path: &Path, content: &[u8]) -> Result<(), Error> {
    let needed = content.len() as u64;
    let fail = |e| write_error(path, needed, e);
    let mut file = OpenOptions::new().write(true).create_new(true).open(path).map_err(fail)?;
    file.write_all(content).map_err(fail)?;
    file.sync_all().map_err(fail)
}

/// An exclusive lock on a sidecar file; released when dropped or when the process ends.
pub struct SidecarLock {
    pub path: PathBuf,
    // Closing the file releases the lock.
    _file: File,
}

impl SidecarLock {
    /// Waits until no other process or thread holds the lock; `on_wait` is called before waiting.
    /// For files that nobody removes.
    pub fn acquire(path: &Path, on_wait: &mut dyn FnMut()) -> Result<SidecarLock, Error> {
        if let Some(lock) = SidecarLock::try_acquire(path)? {
            return Ok(lock);
        }
        on_wait();
        let file = open_lock_file(path)?;
        file.lock().map_err(|e| Error::io(path, e))?;
        Ok(SidecarLock { path: path.to_owned(), _file: file })
    }

    /// `None` when somebody holds it.
    pub fn try_acquire(path: &Path) -> Result<Option<SidecarLock>, Error> {
        for _ in 0..LOCK_TRIES {
            let file = open_lock_file(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(e)) => return Err(Error::io(path, e)),
            }
            // Whoever held the lock before may have removed the file in between, and then it
            // locks nobody out.
            if is_at(&file, path) {
                return Ok(Some(SidecarLock { path: path.to_owned(), _file: file }));
            }
        }
        Ok(None)
    }
}

/// Whether `path` still names `file`.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        match (file.metadata(), fs::metadata(path)) {
            (Ok(file), Ok(named)) => (file.dev(), file.ino()) == (named.dev(), named.ino()),
            _ => false,
        }
    }
    #[cfg(not(unix))]
    {
        // An open file cannot be removed.
        let _ = (file, path);
        true
    }
}

fn open_lock_file(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|e| Error::io(path, e))
}

/// Removes temporary files and folders in `parent` whose name starts with `prefix` and whose
/// owner no longer holds their lock.
pub fn remove_stale(parent: &Path, prefix: &str) -> Result<(), Error> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(parent, e)),
    };
    for entry in entries {
        let name = entry.map_err(|e| Error::io(parent, e))?.file_name();
        let Some(temp) = name.to_str().and_then(|n| n.strip_suffix(".lock")) else { continue };
        if !temp.starts_with(prefix) || !temp.contains(".tmp-") {
            continue;
        }
        let lock_path = parent.join(&name);
        // A lock that cannot even be opened belongs to somebody else.
        if let Ok(Some(lock)) = SidecarLock::try_acquire(&lock_path) {
            let temp = parent.join(temp);
            restore(&temp)?;
            remove_any(&temp)?;
            remove_any(&aside(&temp))?;
            let _ = fs::remove_file(&lock.path);
        }
    }
    Ok(())
}

/// Bytes a process may still write to the file system that holds `path`; `None` where the
/// operating system does not say.
pub fn free_space(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(path).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Fails before anything is written when `needed` bytes and a twentieth more do not fit.
pub fn ensure_space(dir: &Path, needed: u64) -> Result<(), Error> {
    let with_margin = needed.saturating_add(needed / 20);
    match free_space(dir) {
        Some(free) if free < with_margin => Err(disk_full(dir, with_margin)),
        _ => Ok(()),
    }
}

/// The error of a failed write: a full disk says how much was `needed` in all and how much is
/// free.
pub fn write_error(path: &Path, needed: u64, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => disk_full(path, needed),
        _ => Error::io(path, source),
    }
}

fn disk_full(path: &Path, needed: u64) -> Error {
    let dir = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let free = free_space(dir).map_or("an unknown amount".to_owned(), human_bytes);
    Error::Resources(format!(
        "{}: the disk is full: {} needed, {free} free; make room or choose a folder on another \
         disk",
        path.display(),
        human_bytes(needed)
    ))
}

/// `258.3 MB`: decimal units, as disks are sold.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Removes a file, a link or a whole folder; fine when nothing is there.
pub fn remove_any(path: &Path) -> Result<(), Error> {
    let is_dir = match path.symlink_metadata() {
        Ok(metadata) => metadata.is_dir(),
        Err(_) => return Ok(()),
    };
    let removed = if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    }
}

fn refuse_existing(target: &Path) -> Result<(), Error> {
    let is_free = match fs::read_dir(target) {
        Ok(mut entries) => entries.next().is_none(),
        Err(_) => target.symlink_metadata().is_err(),
    };
    if is_free {
        return Ok(());
    }
    Err(Error::Request(format!(
        "{}: already exists; remove it or choose another output",
        target.display()
    )))
}

/// The folder that will hold `target`, and the target's own name.
pub(crate) fn split_target(target: &Path) -> Result<(PathBuf, String), Error> {
    let name = target.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
        Error::Request(format!(
            "'{}' cannot name an output; give a new name in UTF-8",
            target.display()
        ))
    })?;
    let parent = match target.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((parent, name.to_owned()))
}

fn temp_prefix(name: &str) -> String {
    format!(".{name}.tmp-")
}

/// Finds a temporary name nobody uses and locks its sidecar.
fn reserve_temp(parent: &Path, name: &str) -> Result<(PathBuf, SidecarLock), Error> {
    for n in 0..10_000u32 {
        let temp = parent.join(format!("{}{}-{n}", temp_prefix(name), std::process::id()));
        let mut lock_path = temp.clone().into_os_string();
        lock_path.push(".lock");
        let lock_path = PathBuf::from(lock_path);
        let created = OpenOptions::new().write(true).create_new(true).open(&lock_path);
        let file = match created {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(write_error(&lock_path, 0, e)),
        };
        // NOTE: between creation and lock another process may have taken the sidecar for a stale
        // one and removed it; then the name is not ours.
        if file.try_lock().is_ok() && lock_path.exists() {
            return Ok((temp, SidecarLock { path: lock_path, _file: file }));
        }
    }
    Err(Error::Request(format!(
        "{}: no free temporary name for '{name}'; remove the folders that start with '{}'",
        parent.display(),
        temp_prefix(name)
    )))
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(|e| match e.kind() {
        io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
            Error::Request(format!("{}: already exists; another process made it", to.display()))
        }
        _ => write_error(to, 0, e),
    })
}

/// Where [`StagedDir::replace`] keeps an old folder while it has no name.
fn aside(temp: &Path) -> PathBuf {
    let mut old = temp.to_owned().into_os_string();
    old.push(".old");
    PathBuf::from(old)
}

/// Gives a folder that was moved aside its name back, if nothing has taken that since.
fn restore(temp: &Path) -> Result<(), Error> {
    let name = temp.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((target, _)) = name.strip_prefix('.').and_then(|name| name.rsplit_once(".tmp-"))
    else {
        return Ok(());
    };
    let (target, old) = (temp.with_file_name(target), aside(temp));
    match old.symlink_metadata().is_ok() && target.symlink_metadata().is_err() {
        true => rename(&old, &target),
        false => Ok(()),
    }
}

/// Lets two folders change their names in one step; false where that is not possible here.
fn exchange(a: &Path, b: &Path) -> Result<bool, Error> {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        match renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => Ok(false),
            Err(error) => Err(write_error(b, 0, error.into())),
        }
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    {
        let _ = (a, b);
        Ok(false)
    }
}

fn sync_tree(dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| Error::io(&path, e))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            let size = entry.metadata().map_or(0, |m| m.len());
            let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
            file.sync_all().map_err(|e| write_error(&path, size, e))?;
        }
    }
    sync_dir(dir)
}

/// A rename is durable once its folder is.
fn sync_dir(dir: &Path) -> Result<(), Error> {
    #[cfg(unix)]
    {
        let handle = File::open(dir).map_err(|e| Error::io(dir, e))?;
        handle.sync_all().map_err(|e| write_error(dir, 0, e))?;
    }
    #[cfg(not(unix))]
    let _ = dir;
    Ok(())
}

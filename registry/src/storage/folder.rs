//! A local folder as an object store whose every write is durable when it returns.
//!
//! A put writes a file of a random name in `tmp/`, syncs it, renames it to its key and syncs the folders that
//! changed, so a crash leaves the old object, the new one, or a file in `tmp/` that the next start removes. Deletes are
//! synced too, and take folders with them that became empty. Reads and listings are object_store's own.
//!
//! Opening a file happens on the caller's thread: what is asked for often is in the page cache, and a hop to
//! another thread would cost ten times as much.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path as FilePath, PathBuf};
use std::time::{Duration, SystemTime};

use futures_util::stream::BoxStream;
use futures_util::{FutureExt as _, StreamExt as _};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions,
    Result,
};

/// The store's name in errors.
pub(super) const NAME: &str = "folder";
/// Files in `tmp/` that are older are left over from a crash; no put takes as long.
const TMP_MAX_AGE: Duration = Duration::from_secs(3600);

#[derive(Clone, Debug)]
pub(super) struct Folder {
    root: PathBuf,
    inner: std::sync::Arc<LocalFileSystem>,
}

impl Folder {
    /// Opens the folder, which is made if it isn't there.
    pub(super) fn open(root: &FilePath) -> anyhow::Result<Folder> {
        let tmp = root.join("tmp");
        fs::create_dir_all(&tmp)?;
        for entry in fs::read_dir(&tmp)? {
            let entry = entry?;
            let age = SystemTime::now().duration_since(entry.metadata()?.modified()?).unwrap_or_default();
            if age > TMP_MAX_AGE {
                fs::remove_file(entry.path())?;
            }
        }
        let root = fs::canonicalize(root)?;
        let inner = LocalFileSystem::new_with_prefix(&root)?.with_fsync(true);
        Ok(Folder { root, inner: std::sync::Arc::new(inner) })
    }

    fn put_blocking(&self, to: &FilePath, payload: &PutPayload, create: bool) -> io::Result<()> {
        let staged = self.root.join("tmp").join(hex::encode(rand::random::<[u8; 16]>()));
        let publish = || {
            let mut file = File::create_new(&staged)?;
            payload.iter().try_for_each(|chunk| file.write_all(chunk))?;
            file.sync_all()?;
            if create {
                move_durably(&staged, to, |from, to| fs::hard_link(from, to))?;
                fs::remove_file(&staged)
            } else {
                move_durably(&staged, to, |from, to| fs::rename(from, to))
            }
        };
        let result = publish();
        if result.is_err() {
            let _ = fs::remove_file(&staged);
        }
        result
    }

    fn delete_blocking(&self, path: &FilePath) -> io::Result<()> {
        fs::remove_file(path)?;
        let mut folder = path.parent();
        while let Some(at) = folder {
            // The top folders stay. Removing fails where anything is inside, also something that just came.
            let top = at == self.root || at.parent() == Some(&self.root);
            if top || fs::remove_dir(at).is_err() {
                // It may have gone with a delete beside this one, which then syncs what is above.
                return ignore_missing(sync_folder(at));
            }
            folder = at.parent();
        }
        Ok(())
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "folder {}", self.root.display())
    }
}

/// Renames `from`, which must be synced, to `to`, whose folders are made; all of that is on disk on return.
pub(super) fn rename_durably(from: &FilePath, to: &FilePath) -> io::Result<()> {
    move_durably(from, to, |from, to| fs::rename(from, to))
}

fn move_durably(
    from: &FilePath,
    to: &FilePath,
    step: impl Fn(&FilePath, &FilePath) -> io::Result<()>,
) -> io::Result<()> {
    let parent = to.parent().ok_or(ErrorKind::InvalidInput)?;
    let mut made = Vec::new();
    loop {
        match step(from, to) {
            Err(e) if e.kind() == ErrorKind::NotFound && from.exists() => make_folders(parent, &mut made)?,
            other => break other?,
        }
    }
    sync_folder(parent)?;
    // A new folder is durable once the one above it is. Most of them are in the same commit as the sync before.
    made.iter().filter_map(|folder| folder.parent()).try_for_each(sync_folder)
}

fn make_folders(folder: &FilePath, made: &mut Vec<PathBuf>) -> io::Result<()> {
    let missing: Vec<&FilePath> = folder.ancestors().take_while(|at| !at.exists()).collect();
    fs::create_dir_all(folder)?;
    made.extend(missing.into_iter().map(FilePath::to_owned));
    Ok(())
}

fn sync_folder(folder: &FilePath) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// An error of the system as one of the store.
pub(crate) fn generic(error: io::Error) -> Error {
    Error::Generic { store: NAME, source: Box::new(error) }
}

fn convert(path: &Path, error: io::Error) -> Error {
    let (path, kind) = (path.to_string(), error.kind());
    match kind {
        ErrorKind::NotFound => Error::NotFound { path, source: Box::new(error) },
        ErrorKind::AlreadyExists => Error::AlreadyExists { path, source: Box::new(error) },
        ErrorKind::PermissionDenied => Error::PermissionDenied { path, source: Box::new(error) },
        _ => generic(error),
    }
}

async fn blocking<T: Send + 'static>(
    path: Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await?.map_err(|e| convert(&path, e))
}

#[async_trait::async_trait]
impl ObjectStore for Folder {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        if !opts.attributes.is_empty() || matches!(opts.mode, PutMode::Update(_)) {
            return self.inner.put_opts(location, payload, opts).await;
        }
        let (to, create) = (self.inner.path_to_filesystem(location)?, matches!(opts.mode, PutMode::Create));
        let this = self.clone();
        blocking(location.clone(), move || this.put_blocking(&to, &payload, create)).await?;
        Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let path = self.inner.path_to_filesystem(location)?;
        let open = || {
            let file = File::open(&path)?;
            let metadata = file.metadata()?;
            if metadata.is_dir() {
                return Err(io::Error::from(ErrorKind::NotFound));
            }
            let modified = metadata.modified()?.into();
            Ok((file, metadata.len(), modified))
        };
        let (file, size, last_modified) = open().map_err(|e| match e.kind() {
            // A part of the path is a file: there is no such object.
            ErrorKind::NotADirectory => convert(location, ErrorKind::NotFound.into()),
            _ => convert(location, e),
        })?;
        let meta = ObjectMeta { location: location.clone(), last_modified, size, e_tag: None, version: None };
        options.check_preconditions(&meta)?;
        let range = match options.range {
            Some(range) => {
                range.as_range(size).map_err(|e| Error::Generic { store: NAME, source: e.into() })?
            }
            None => 0..size,
        };
        let payload = GetResultPayload::File(file, path);
        Ok(GetResult {
            payload,
            meta,
            range,
            attributes: Attributes::default(),
            extensions: Default::default(),
        })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let delete = move |location: Result<Path>| {
            let this = this.clone();
            async move {
                let location = location?;
                let path = this.inner.path_to_filesystem(&location)?;
                blocking(location.clone(), move || this.delete_blocking(&path)).await?;
                Ok(location)
            }
            .boxed()
        };
        locations.map(delete).buffered(8).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.inner.rename_opts(from, to, options).await
    }
}

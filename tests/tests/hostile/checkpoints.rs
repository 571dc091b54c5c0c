//! Checkpoints that mean harm: a clear error that names the file, soon, in little memory.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::Report;
use crate::client::post;
use crate::neighbour::Neighbour;
use crate::process::Server;

/// How soon a server that cannot load must have ended.
const LOAD_TIME: Duration = Duration::from_secs(20);
/// How long a request may take whose template or tokenizer means harm.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// Bytes that a template may cost.
const TEMPLATE_BYTES_MAX: usize = 256 << 20;
/// Bytes of address space for a server that must not load: a loader that takes what a file asks for ends in an abort.
const ADDRESS_SPACE_KIB: usize = 6 << 20;

/// A copy of the tiny Qwen3 with one file spoiled.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, spoil: impl FnOnce(&Path)) -> Self {
        let folder = std::env::temp_dir().join(format!("bcg-hostile-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("a folder");
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        for entry in fs::read_dir(model).expect("the tiny checkpoint").map(|entry| entry.expect("an entry").path()) {
            fs::copy(&entry, folder.join(entry.file_name().expect("a name"))).expect("a copy");
        }
        spoil(&folder);
        Self(folder)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a plain path")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn replace(folder: &Path, file: &str, bytes: impl AsRef<[u8]>) {
    fs::write(folder.join(file), bytes).expect("a file");
}

fn edit(folder: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let text = fs::read(folder.join(file)).expect("a file");
    let mut value: Value = serde_json::from_slice(&text).expect("JSON");
    change(&mut value);
    replace(folder, file, value.to_string());
}

fn instead(folder: &Path, file: &str, make: impl FnOnce(&Path)) {
    let _ = fs::remove_file(folder.join(file));
    make(&folder.join(file));
}

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().expect("mkfifo runs").success());
}

fn with_number(key: &'static str, number: u64) -> impl FnOnce(&Path) {
    move |folder| edit(folder, "config.json", |config| config[key] = json!(number))
}

/// Runs all rows.
pub(crate) fn run(report: &mut Report) {
    files(report);
    numbers(report);
    weights(report);
    templates(report);
    tokenizers(report);
}

/// A row whose checkpoint must be refused with a line that names `names`.
fn refused(report: &mut Report, name: &str, names: &str, spoil: impl FnOnce(&Path)) {
    report.row("checkpoint", name, || {
        let folder = Folder::new("refused", spoil);
        let mut server = Server::spawn_within(ADDRESS_SPACE_KIB, folder.path(), &[]);
        let Some(status) = server.wait(LOAD_TIME) else {
            return Err(format!("still there after {LOAD_TIME:?}: {}", server.log()));
        };
        let log = server.log();
        match status.code() {
            Some(1) if log.contains(names) && !log.contains("panicked") => Ok(()),
            _ => Err(format!("{status}: {log}")),
        }
    });
}

fn files(report: &mut Report) {
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        refused(report, &format!("{file} is a FIFO"), file, |folder| instead(folder, file, fifo));
        refused(report, &format!("{file} is a folder"), file, |folder| {
            instead(folder, file, |path| fs::create_dir(path).expect("a folder"));
        });
        refused(report, &format!("{file} is /dev/zero"), file, |folder| {
            instead(folder, file, |path| symlink("/dev/zero", path).expect("a link"));
        });
        refused(report, &format!("{file} leads to itself"), file, |folder| {
            instead(folder, file, |path| symlink(path, path).expect("a link"));
        });
        refused(report, &format!("{file} is empty"), file, |folder| replace(folder, file, ""));
    }
    refused(report, "config.json is missing", "config.json", |folder| instead(folder, "config.json", |_| ()));
    refused(report, "config.json of 1 GiB", "config.json", |folder| {
        instead(folder, "config.json", |path| {
            fs::File::create(path).and_then(|file| file.set_len(1 << 30)).expect("a sparse file");
        });
    });
    refused(report, "config.json is 1,000,000 deep", "config.json", |folder| {
        replace(folder, "config.json", "[".repeat(1_000_000));
    });
}

fn numbers(report: &mut Report) {
    for key in [
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "head_dim",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    ] {
        for number in [0, 1_000_000_007, u64::MAX] {
            refused(report, &format!("{key} is {number}"), "", with_number(key, number));
        }
    }
    refused(report, "a context of 2^63 tokens", "", with_number("max_position_embeddings", 1 << 63));
}

fn weights(report: &mut Report) {
    let file = "model.safetensors";
    refused(report, "a header of 2^63 bytes", file, |folder| replace(folder, file, (1_u64 << 63).to_le_bytes()));
    refused(report, "a header longer than its file", file, |folder| {
        replace(folder, file, [&1000_u64.to_le_bytes()[..], b"{}"].concat());
    });
    refused(report, "a file that ends early", file, |folder| {
        let bytes = fs::read(folder.join(file)).expect("weights");
        replace(folder, file, &bytes[..bytes.len() / 2]);
    });
    refused(report, "an index that leads elsewhere", "", |folder| {
        fs::rename(folder.join(file), folder.join("other.safetensors")).expect("a rename");
        let index = json!({"weight_map": {"model.embed_tokens.weight": "../../../../etc/passwd"}});
        replace(folder, "model.safetensors.index.json", index.to_string());
    });
}

/// A row whose template must be refused at load, or fail each request that uses it while others are served.
fn contained(report: &mut Report, name: &str, spoil: impl FnOnce(&Path)) {
    report.row("checkpoint", name, || {
        let folder = Folder::new("contained", spoil);
        let mut server = Server::spawn(folder.path(), &["--context-length", "512"], &[]);
        if !server.until_ready_or_ended() {
            return match server.wait(LOAD_TIME).and_then(|status| status.code()) {
                Some(1) if !server.log().contains("panicked") => Ok(()),
                status => Err(format!("ended with {status:?}: {}", server.log())),
            };
        }
        let neighbour = Neighbour::start(server.address);
        let before = server.resident_bytes();
        server.forget_peak();
        let body = r#"{"messages": [{"role": "user", "content": "aaaaaaaaaaaaaaaa"}], "max_tokens": 2}"#;
        let reply = post(server.address, "/v1/chat/completions", body);
        let grown = server.peak_bytes().saturating_sub(before);
        let seen = neighbour.stop()?;
        let reply = reply?;
        if !(400..=500).contains(&reply.status) || reply.took > REQUEST_TIME || grown > TEMPLATE_BYTES_MAX {
            return Err(format!(
                "{} after {:?} with {} MiB: {}",
                reply.status,
                reply.took,
                grown >> 20,
                reply.body.chars().take(300).collect::<String>()
            ));
        }
        if seen.slowest_health > Duration::from_millis(500) {
            Err(format!("another user saw {seen:?}"))
        } else {
            Ok(())
        }
    });
}

fn templates(report: &mut Report) {
    let templates = [
        ("a template that loops", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        ("a template with a long range", "{% for a in range(10000000000) %}{% endfor %}"),
        ("a template that repeats", "{{ 'a' * 10000000000 }}"),
        (
            "a template that doubles",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        ),
        (
            "a template that adds",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        ),
        (
            "a template that doubles a list",
            "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        ),
        ("a template that indents", "{{ 'a\\nb' | indent(10000000000) }}"),
        (
            "a template that replaces",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}{{ ns.x }}",
        ),
        (
            "a template that joins",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join(ns.x) %}{% endfor %}{{ ns.x }}",
        ),
        ("a template that calls itself", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"),
        ("a template that includes itself", "{% include 'chat' %}"),
        ("a template that does not parse", "{% for %}"),
        ("a template of 64 MiB", ""),
    ];
    for (name, template) in templates {
        contained(report, name, |folder| {
            let text = if template.is_empty() { "a".repeat(64 << 20) } else { template.to_owned() };
            replace(folder, "chat_template.jinja", text);
        });
    }
}

fn tokenizers(report: &mut Report) {
    contained(report, "a normaliser that explodes", |folder| {
        edit(folder, "tokenizer.json", |tokenizer| {
            let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(1000)});
            tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [replace, replace, replace]});
        });
    });
    refused(report, "tokens beyond the vocabulary", "tokenizer.json", |folder| {
        edit(folder, "tokenizer.json", |tokenizer| {
            tokenizer["model"]["vocab"]["hostile"] = json!(100_000);
        });
    });
    refused(report, "a token with the id 2^32 - 1", "tokenizer.json", |folder| {
        edit(folder, "tokenizer.json", |tokenizer| {
            tokenizer["model"]["vocab"]["hostile"] = json!(u32::MAX);
        });
    });
}

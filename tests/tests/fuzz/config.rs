//! `config.json`, `generation_config.json` and `tokenizer.json`.

use bcg_models::weights::{Shard, Weights};
use bcg_models::{ModelConfig, Tokenizer, registry};
use bcg_runtime::Device;
use proptest::prelude::*;
use serde_json::json;

use super::document::documents;
use super::{CHECKPOINTS, Folder, campaign, models, read_json};

#[test]
fn any_configuration_is_read_or_refused() {
    let geometries = std::fs::read_dir(models().join("geometries")).expect("the geometries");
    let mut folders: Vec<_> = geometries.map(|entry| entry.expect("an entry").path()).collect();
    folders.sort();
    let tiny = CHECKPOINTS.map(|name| models().join(name));
    folders.splice(0..0, tiny.clone());
    let configs = folders.iter().map(|folder| read_json(&folder.join("config.json"))).collect();
    let generations = vec![read_json(&tiny[0].join("generation_config.json")), json!({"eos_token_id": [1, 2]})];
    let inputs = (documents(configs), prop::option::of(documents(generations)));
    let (folder, device) = (Folder::new("config"), Device::host());
    campaign::run("config", &inputs, |(document, generation)| {
        folder.set("config.json", Some(&document.bytes));
        folder.set("generation_config.json", generation.as_ref().map(|generation| &generation.bytes[..]));
        let Ok(config) = ModelConfig::load(&folder.0) else { return Ok(false) };
        config.cache_layout(Shard::WHOLE).map_err(|error| format!("no layout after a load: {error}"))?;
        // Some find all of their tensors, and all must come back.
        let checkpoint = &folders[document.origin % tiny.len()];
        let weights =
            Weights::open(checkpoint, &device, config.dtype, Shard::WHOLE).map_err(|error| error.to_string())?;
        let _ = registry::load(&config, weights);
        Ok(true)
    });
}

#[test]
fn any_tokenizer_is_loaded_or_refused() {
    let mut tokenizer = read_json(&models().join(CHECKPOINTS[0]).join("tokenizer.json"));
    // Few words: most changes are then to the parts that are at work.
    let vocabulary = tokenizer["model"]["vocab"].as_object().expect("a vocabulary").clone();
    tokenizer["model"]["vocab"] = vocabulary.into_iter().filter(|(_, id)| id.as_u64() < Some(20)).collect();
    tokenizer["model"]["merges"] = json!([]);
    let unigram = json!({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["▁a", -2.5]]},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "added_tokens": [{"id": 3, "content": "<s>", "single_word": false, "lstrip": true, "rstrip": true,
            "normalized": true, "special": true}], "decoder": {"type": "Metaspace", "replacement": "▁"}});
    let folder = Folder::new("tokenizer");
    campaign::run("tokenizer", &documents(vec![tokenizer, unigram]), |document| {
        folder.set("tokenizer.json", Some(&document.bytes));
        let Ok(tokenizer) = Tokenizer::load(&folder.0) else { return Ok(false) };
        let Ok(ids) = tokenizer.encode_content("Hello  <|im_start|> <s> a１2 é漢", true) else { return Ok(false) };
        let _ = tokenizer.decode(&ids, true);
        let _ = tokenizer.check_vocabulary(&folder.0, 20);
        Ok(true)
    });
}

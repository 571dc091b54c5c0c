//! `config.json` and `generation_config.json`.

use bcg_models::weights::Weights;
use bcg_models::{ModelConfig, registry};
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
        config.cache_layout().map_err(|error| format!("no layout after a load: {error}"))?;
        // Some find all of their tensors, and all must come back.
        let checkpoint = &folders[document.origin % tiny.len()];
        let weights = Weights::open(checkpoint, &device, config.dtype).map_err(|error| error.to_string())?;
        let _ = registry::load(&config, weights);
        Ok(true)
    });
}

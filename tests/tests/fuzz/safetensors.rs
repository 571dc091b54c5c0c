//! Safetensors files: the length of the header, the header, the data, and the index of shards.

use std::fs;

use bcg_models::weights::{Shard, Weights};
use bcg_models::{ModelConfig, registry};
use bcg_runtime::Device;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value, json};

use super::document::documents;
use super::{CHECKPOINTS, Folder, campaign, models};

/// A file in two parts, without the length in front of them.
struct Checkpoint {
    config: ModelConfig,
    header: Value,
    data: Vec<u8>,
}

fn checkpoint(name: &str) -> Checkpoint {
    let folder = models().join(name);
    let bytes = fs::read(folder.join("model.safetensors")).expect("the checkpoint");
    let (len, rest) = bytes.split_first_chunk().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    Checkpoint {
        config: ModelConfig::load(&folder).expect("a configuration"),
        header: serde_json::from_slice(header).expect("a header"),
        data: data.to_vec(),
    }
}

/// What the file says that its header's length is.
fn lengths() -> impl Strategy<Value = Option<u64>> {
    let odd = [0, 1, 7, 8, 100_000_000, 100_000_001, u64::from(u32::MAX), u64::MAX - 7, u64::MAX, 1 << 63];
    prop_oneof![9 => Just(None), 1 => select(odd.to_vec()).prop_map(Some), 1 => any::<u64>().prop_map(Some)]
}

#[test]
fn any_safetensors_file_is_loaded_or_refused() {
    // Two small ones; a file is written anew for each input.
    let checkpoints = [checkpoint(CHECKPOINTS[0]), checkpoint(CHECKPOINTS[2])];
    let headers = checkpoints.iter().map(|checkpoint| checkpoint.header.clone()).collect();
    let names = checkpoints[0].header.as_object().expect("an object").keys().filter(|key| *key != "__metadata__");
    let shards: Map<String, Value> = names.map(|name| (name.clone(), json!("model.safetensors"))).collect();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": shards});
    let kept = prop_oneof![4 => Just(None), 1 => any::<prop::sample::Index>().prop_map(Some)];
    let inputs = (documents(headers), lengths(), kept, prop::option::weighted(0.1, documents(vec![index])));
    let (folder, device) = (Folder::new("safetensors"), Device::host());
    campaign::run("safetensors", &inputs, |(header, len, kept, index)| {
        let checkpoint = &checkpoints[header.origin];
        let len = len.unwrap_or(header.bytes.len() as u64);
        let data = kept.map_or(&checkpoint.data[..], |kept| &checkpoint.data[..kept.index(checkpoint.data.len())]);
        folder.set("model.safetensors", Some(&[&len.to_le_bytes(), &header.bytes[..], data].concat()));
        folder.set("model.safetensors.index.json", index.as_ref().map(|index| &index.bytes[..]));
        let weights = Weights::open(&folder.0, &device, checkpoint.config.dtype, Shard::WHOLE);
        Ok(weights.is_ok_and(|weights| registry::load(&checkpoint.config, weights).is_ok()))
    });
}

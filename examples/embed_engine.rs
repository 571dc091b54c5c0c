//! Runs the engine inside a program: no HTTP, no command line. It batches whatever is submitted, from any thread.
//!
//! `cargo run -p bcg-examples --bin embed_engine`

use bcg_engine::{ChatMessage, DeviceChoice, Engine, EngineEvent, EngineOptions, GenerationRequest, Prompt, load};

fn main() -> anyhow::Result<()> {
    let mut options = EngineOptions::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3"));
    options.device = DeviceChoice::Host;
    let engine = load::start(&options, |_| ())?;

    let question = "Raj has 10 boxes with 12 books in each. How many books is that?";
    println!("{question}");
    let prompt = Prompt::chat(vec![ChatMessage::new("user", question)]);
    let mut answer = engine.submit(GenerationRequest::greedy(prompt))?;
    while let Some(event) = answer.next_blocking() {
        match event {
            EngineEvent::Delta(delta) => print!("{}", delta.text),
            EngineEvent::Finished { reason, .. } => println!(" ({})", reason.as_str()),
            EngineEvent::Failed(message) => anyhow::bail!(message),
        }
    }
    Ok(())
}

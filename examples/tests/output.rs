//! Runs each example and compares what it prints, but for the first line, which names the device that was found.

use std::process::Command;

fn printed(executable: &str) -> String {
    let output = Command::new(executable).output().unwrap();
    assert!(output.status.success(), "{executable}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_once('\n').unwrap().1.to_owned()
}

#[test]
fn own_break_uses_the_batch_of_each_run() {
    assert_eq!(
        printed(env!("CARGO_BIN_EXE_own_break")),
        "captured with scale 2: [2.0, 4.0]\nreplayed with scale 3: [3.0, 6.0]\nreplayed with scale 10: [10.0, 20.0]\n"
    );
}

#[test]
fn own_kernel_runs_in_a_break() {
    assert_eq!(
        printed(env!("CARGO_BIN_EXE_own_kernel")),
        "factor 2: [4.0, 8.0, 12.0, 16.0]\nfactor 3: [9.0, 18.0, 27.0, 36.0]\n"
    );
}

#[test]
fn embed_engine_answers_a_question() {
    assert_eq!(printed(env!("CARGO_BIN_EXE_embed_engine")), "10*12=120 #### 120 (stop)\n");
}

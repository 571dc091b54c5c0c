//! What compiles, and what the user reads where it does not. Values belong to the conformance suite.
//!
//! After a change of a message: `TRYBUILD=overwrite cargo test -p bcg-macros --test ui`, then read the difference.

#[test]
fn correct_uses_compile_and_wrong_ones_say_what_to_do() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/ui/pass/*.rs");
    cases.compile_fail("tests/ui/fail/*.rs");
    cases.compile_fail("tests/ui/fail/types/*.rs");
}

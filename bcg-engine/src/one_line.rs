//! An error and its causes on one line.

/// Writes an error and its causes on one line, each cause once.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_line = cause.to_string();
        if !line.contains(&cause_line) {
            line = format!("{line}: {cause_line}");
        }
        source = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_the_error_already_tells_is_not_told_twice() {
        let inner = anyhow::anyhow!("no such file").context("config.json: no such file").context("--model x");
        assert_eq!(one_line(inner.as_ref()), "--model x: config.json: no such file");
    }
}
